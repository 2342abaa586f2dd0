"""How the embedded toys were trained; `scripts/train_toy.py` is the command.

stages       runs that go on where they stopped, learning rates
text         a tokenizer and both text encoders
vae          the picture's way into latents and back
video        the clip's
subjects     what differs between pictures and clips
families     what differs between the models: blocks, loss, pipeline
wan          what makes Wan's training cheap
transformer  flow matching
record       the pipeline and what it was made by, as files
evaluation   pictures of unseen captions, marked
"""

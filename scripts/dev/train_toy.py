"""Train a toy pipeline on pictures drawn from captions, and mark what it generates.

    python scripts/train_toy.py --model flux --seed 0           # all stages, then --evaluate
    python scripts/train_toy.py --model flux --stage vae        # one stage
    python scripts/train_toy.py --model flux --evaluate         # mark the saved pipeline

Stages: ``text`` (both encoders learn to name a caption's attributes, then freeze), ``vae`` (both
halves, then the decoder alone), ``transformer`` (flow matching; pictures first at 64 px, then at
128 px). Each stage leaves a checkpoint under ``runs/toys/`` and goes on from there when the command
is given again; a finished stage is not repeated. All models of pictures share text encoders and
VAE; ``wan``, which draws clips, has its own. The pipeline goes
to ``toys/MODEL`` in half precision, its record to ``toys/MODEL/training``.
"""

import json
import shlex
import sys
from pathlib import Path

from toys.training.evaluation import evaluate
from toys.training.families import FAMILIES
from toys.training.record import write_training_record
from toys.training.stages import RUNS
from toys.training.text import train_text
from toys.training.transformer import train_transformer
from xfuser_fastcache.cli.flags import flags_of


def parse_args(arguments):
    """Command line; the defaults are what the shipped toys were trained with."""
    parser = flags_of("scripts/train_toy.py", __doc__)
    parser.add_argument("--model", choices=sorted(FAMILIES), default="flux")
    parser.add_argument("--stage", choices=["text", "vae", "transformer", "all"], default="all")
    parser.add_argument("--evaluate", action="store_true", help="only mark the saved pipeline")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--captions", type=int, default=128, help="unseen captions to evaluate")
    parser.add_argument("--steps", type=int, default=28, help="denoising steps of the evaluation")
    parser.add_argument("--text_iterations", type=int, help="default: the language's")
    parser.add_argument("--vae_iterations", type=int, default=600)
    parser.add_argument("--decoder_iterations", type=int, default=1500)
    parser.add_argument("--vae_batch", type=int, default=16)
    parser.add_argument("--clip_vae_iterations", type=int, nargs="+", default=[2500, 2200, 2500])
    parser.add_argument("--clip_batch", type=int, default=8)
    parser.add_argument("--small_iterations", type=int, help="at 64 px; default: the model's")
    parser.add_argument("--small_batch", type=int, default=32)
    parser.add_argument(
        "--large_iterations",
        type=int,
        nargs="+",
        help="at full size, a cycle; default: the model's",
    )
    parser.add_argument("--large_batch", type=int, help="at full size; default: the model's")
    parser.add_argument("--pool", type=int, default=4096, help="encoded pictures kept at 64 px")
    parser.add_argument(
        "--device", default="cpu", help="of the clips' VAE and of wan's transformer"
    )
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the checkpoints")
    args = parser.parse_args(arguments)
    if args.device != "cpu" and args.model != "wan":
        parser.error(f"--device {args.device} is for --model wan; {args.model} trains on the CPU")
    return args


def main(arguments):
    """Run the stages asked for, then mark the result; return the exit status."""
    args = parse_args(arguments)
    family = FAMILIES[args.model]()
    args.small_iterations = args.small_iterations or family.small_iterations
    args.large_iterations = args.large_iterations or family.large_iterations
    args.large_batch = args.large_batch or family.large_batch
    subject = family.subject
    args.text_iterations = args.text_iterations or subject.language.iterations
    if not args.evaluate:
        print("$", shlex.join(["python", *sys.argv]), flush=True)
        text, text_stage = train_text(args, subject.language)
        if args.stage == "text":
            return 0
        vae, vae_stage = subject.train_vae(args)
        stages = {"text": text_stage, "vae": vae_stage}
        if subject.train_decoder is not None:
            stages["decoder"] = subject.train_decoder(args, vae)
        print("vae", json.dumps(subject.measure_vae(vae, args.seed)), flush=True)
        if args.stage == "vae":
            return 0
        transformer_stages = train_transformer(args, family, text, vae)
        write_training_record(args, family, stages | transformer_stages, vae)
    evaluate(args, family)
    return 0

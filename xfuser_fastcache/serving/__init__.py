"""A service that draws pictures over HTTP, one at a time on all ranks.

requests     what a client may ask for, and the limits
heads        what reaches the service at all, told by its head
connections  how many there are, and how long a request may take to arrive
refusals     how a request is told that it gets no picture
desk         the one way of a request, whichever door it came by, and its events
openai       OpenAI's images API
web          HTTP in front of the service
service      the queue on rank 0, and what happens to a request
meters       what is counted, for /statistics and /metrics
drawing      one request on one rank
joining      how the ranks find each other at the start
line         what ranks tell each other beside the model's collectives
"""

"""A service that draws pictures over HTTP, one at a time on all ranks.

requests    what a client may ask for, and the limits
web         HTTP in front of the service
service     the queue on rank 0, and what happens to a request
meters      what is counted, for /statistics and /metrics
drawing     one request on one rank
line        what ranks tell each other beside the model's collectives
"""

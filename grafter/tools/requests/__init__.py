"""Records the requests that drove a server, and sends them again. A separate tool beside grafting.

Recording, from a request to a file:

    recorder           `grafter.RequestRecorder`: what is in flight, what is finished, when a batch is due
    entry              one request in memory, the line that represents it, and what the bytes of a body say
    credentials        which names, values and headers are secrets
    batch_file         a batch on disk: lines and tensors, each renamed when it is complete; objects as JSON and tensors
    process_end        a crash, SIGTERM, the end: what is in memory is written first
    proxy              `grafter record`: passes everything on as it arrives, and keeps a copy
    upstream, serving  the proxy's connections; the program around it

Replaying, from a file to a verdict:

    reading            reads recordings without trusting them: bounded, each fault with its line
    call               a recorded request as one HTTP call, with the recorded output's length
    answers            a server's reply: text, tokens and logprobs of its answer
    replay             all requests in order, with the recorded gaps, to one server or two at the same time
    reply_comparison   what differs between two replies, and the verdict

The recorder needs only grafter. The proxy and the replay need the extra `requests`.
"""

"""Requests that drove a server: recorded while it serves, and sent again. A tool beside the tool.

Recording, from a request to a file:

recorder      `grafter.RequestRecorder`: what is in flight, what is over, when a batch is due
encoding      any object -> JSON and tensors, at the call or later (entry: one request in memory; headers: which of them
              are secrets)
batch_file    a batch on disk: lines and tensors, each renamed when it is whole
alive         the recorders of this process, for `grafter ctl`
process_end   a crash, SIGTERM, the end: what is in memory is written first
proxy         `grafter record`: passes everything on as it comes, and keeps a copy (upstream: its connections;
              bodies: of bytes, what they say; serving: its life as a program)

Replaying, from a file to a verdict:

reading       recordings without trust: bounded, each fault with its line
call          a recorded request as one HTTP call; forcing: with the recorded output's length
sending       one call to one server, whose error is an outcome (answers: text, tokens, logprobs of what came)
replay        all of them in order, with the recorded gaps, to one server or two at once
judgement     what differs; table: to look at, or as JSON
commands      `grafter record` and `grafter replay`

The recorder needs nothing but grafter. The proxy and the replay need the extra `requests`.
"""

"""Records the requests that drove a server, and sends them again. A separate tool beside grafting.

Recording, from a request to a file:

    recorder      `grafter.RequestRecorder`: what is in flight, what is finished, when a batch is due
    encoding      any object -> JSON and tensors, at the call or later (entry: one request in memory; headers: which of
                  them are secrets)
    batch_file    a batch on disk: lines and tensors, each renamed when it is complete
    alive         the recorders of this process, for `grafter ctl`
    process_end   a crash, SIGTERM, the end: what is in memory is written first
    proxy         `grafter record`: passes everything on as it arrives, and keeps a copy (upstream: its connections;
                  bodies: the content of bytes; serving: the program around it)

Replaying, from a file to a verdict:

    reading       reads recordings without trusting them: bounded, each fault with its line
    call          a recorded request as one HTTP call; forcing: with the recorded output's length
    sending       one call to one server, whose error is an outcome (answers: text, tokens, logprobs of the answer)
    replay        all of them in order, with the recorded gaps, to one server or two at the same time
    judgement     what differs; table: printed as a table, or as JSON
    commands      `grafter record` and `grafter replay`

The recorder needs only grafter. The proxy and the replay need the extra `requests`.
"""

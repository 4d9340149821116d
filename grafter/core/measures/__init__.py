"""Measures: what a tensor is like, and how far two are apart, as `stats` (and, for `grafter compare`, docs/compare.md)
defines it.

flat_chunks  the flattened index cut into fixed chunks, so that no digit depends on strides or threads
chunk_pass   the tensors, chunk by chunk, in bounded memory
chunk_sums   the sums of one chunk
stats        chunks combined into statistics and differences

Two dumps are read block by block, and more is measured:

pair_stream  blocks cut into the same chunks, each measured once, by this thread or an idle one
pair_chunks  the measures of a few chunks at a time
magnitudes   how large the differences are: a histogram, and percentiles from it
ulps         how many representable numbers lie between two values
rows         the worst rows (tokens, say), and the KL divergence of logits
"""

"""Core: points, filters, layouts, tokens, plans, messages, measures, write-back. No sockets, no processes."""

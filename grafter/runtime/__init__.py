"""Runtime: one point, from the call to its outcome. Session, gradients and recomputation."""

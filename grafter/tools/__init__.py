"""Tools: programs around a run. The launcher of both jobs, the doctor, recorded requests."""

"""Settings: GRAFTER_* and the plan file become one frozen, validated GrafterConfig.

config          the fields, their checks, and where each value came from
plan_file       the YAML that both jobs can share, read with the line of each fault
rules           its ordered rules by name pattern, and `names`
setting_errors  what a faulty setting says
"""

"""Settings: GRAFTER_* and the plan file become one frozen, validated GrafterConfig.

config          the fields, and methods that answer questions about them: GrafterConfig
field_types     the types of fields: which texts are legal; which fields are filters, and which tags these may read
given_settings  checks before validation: unknown names, the plan file, missing settings; and messages for faults
plan_file       the YAML that both jobs can share, and its rules
"""

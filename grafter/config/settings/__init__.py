"""Settings: GRAFTER_* and the plan file become one frozen, validated GrafterConfig.

given_settings  what was given: names that do not exist, the plan file below it, what is missing
plan_file       the YAML that both jobs can share, read with the line of each fault
rules           its ordered rules by name pattern, and `names`
field_types     what the text of a field may be
filter_fields   which fields are filters, and which tags each may read
config          the fields, and what is asked of them: GrafterConfig
setting_errors  what a faulty setting says
"""

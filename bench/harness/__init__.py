"""What every benchmark stands on: time, gates, bytes, jobs, one file of results a study, tables and pictures."""

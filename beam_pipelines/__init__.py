"""Jobs: options, pipelines, the command line, the report."""

"""Jobs: options, pipelines, the command line."""

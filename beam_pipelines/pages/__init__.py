"""Pages that people look at: the report about a snapshot, and that of a sweep. Each is one self-contained HTML file."""

"""Jobs on Dataflow: their requests, templates made of them, and what stops them."""

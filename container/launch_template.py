"""What the template launcher starts: a file of its own, since a script's folder is where Python looks for modules first."""

import sys

from beam_pipelines.cloud.template_main import main

if __name__ == "__main__":
    sys.exit(main())

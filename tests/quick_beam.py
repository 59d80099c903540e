"""Beam with a memory: it works out signatures and options anew thousands of times per pipeline, half of a small run's time.

For tests in process; what tests start as a process of its own is Beam as it is.
"""

import functools
import sys


def ask_once() -> None:
    """Keep Beam's answers about signatures and options in this process."""
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.transforms import userstate
    from apache_beam.typehints import decorators

    get_signature = decorators.get_signature
    kept = functools.cache(get_signature)
    for module in list(sys.modules.values()):
        if getattr(module, "get_signature", None) is get_signature:
            module.get_signature = kept
    userstate.get_dofn_specs = functools.cache(userstate.get_dofn_specs)
    make_view = PipelineOptions.view_as
    views: dict[tuple[int, type], tuple[PipelineOptions, object]] = {}

    def view_as(self: PipelineOptions, cls: type) -> PipelineOptions:
        key = id(self._all_options), cls  # all views of one set of options share this
        if key not in views:
            views[key] = make_view(self, cls), self._all_options
        return views[key][0]

    PipelineOptions.view_as = view_as

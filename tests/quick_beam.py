"""Beam with a memory: it works out signatures and options anew thousands of times per pipeline, half of a small run's time.

For tests in process; what tests start as a process of its own is Beam as it is.
"""

import functools
import sys
import types


def ask_once() -> None:
    """Keep Beam's answers about signatures and options in this process."""
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.transforms import userstate
    from apache_beam.typehints import decorators

    get_signature = decorators.get_signature
    of_function, of_bound = functools.cache(get_signature), {}

    def kept(function: object) -> object:
        if not isinstance(function, types.MethodType):
            return of_function(function)
        # A DoFn is unpickled for every bundle; the methods of all that are of its class read alike.
        if function.__func__ not in of_bound:
            of_bound[function.__func__] = get_signature(function)
        return of_bound[function.__func__]

    for module in list(sys.modules.values()):
        if getattr(module, "get_signature", None) is get_signature:
            module.get_signature = kept
    get_dofn_specs, specs = userstate.get_dofn_specs, {}

    def dofn_specs(dofn: object) -> object:
        key = type(dofn), getattr(dofn, "_fn", None)  # of a wrapped function, its own arguments count
        if key not in specs:
            specs[key] = get_dofn_specs(dofn)
        return specs[key]

    userstate.get_dofn_specs = dofn_specs
    make_view = PipelineOptions.view_as
    views: dict[tuple[int, type], tuple[PipelineOptions, object]] = {}

    def view_as(self: PipelineOptions, cls: type) -> PipelineOptions:
        key = id(self._all_options), cls  # all views of one set of options share this
        if key not in views:
            views[key] = make_view(self, cls), self._all_options
        return views[key][0]

    PipelineOptions.view_as = view_as

"""Beam with a memory: it works out signatures and options anew thousands of times per pipeline, most of a small run's time.

For tests in process, and what tests/proof/nursery.py forks. What is started as a process of its own, Beam's workers too, is Beam as it is.
"""

import bz2
import functools
import gc
import sys
import types
from collections.abc import Callable
from concurrent import futures
from typing import Any


def ask_once() -> None:
    """Keep Beam's answers about functions and options in this process, and start no thread for every bundle."""
    _remember_functions()
    _remember_options()
    _keep_no_origins()
    _pickle_small()
    _start_no_threads()
    _count_values_alike()
    _describe_own_collections()


def collect_little() -> None:
    """The collector need not walk what modules have loaded, a third of a second each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def _same_reading(function: Any) -> Any:
    """What a function's signature depends on: lambdas are unpickled for every bundle, those that are written alike read alike."""
    if isinstance(function, types.MethodType):
        return function.__func__
    if not isinstance(function, types.FunctionType) or function.__dict__.keys() & {
        "__wrapped__",
        "__signature__",
    }:
        return function
    written = function.__code__, function.__defaults__, *function.__annotations__.items()
    try:
        hash(written)
    except TypeError:
        return function
    return written


def _remember_functions() -> None:
    from apache_beam.transforms import core, userstate
    from apache_beam.typehints import decorators

    signature = _once(decorators.get_signature, _same_reading)
    for module, name in _named(decorators.get_signature):
        setattr(module, name, signature)
    core.get_function_args_defaults = _once(core.get_function_args_defaults, _same_reading)
    core._check_fn_use_yield_and_return = _once(core._check_fn_use_yield_and_return, _same_reading)

    from_callable = _once(decorators.IOTypeHints.from_callable, _same_reading)
    decorators.IOTypeHints.from_callable = staticmethod(from_callable)

    def of_dofn(dofn: Any) -> object:
        wrapped = getattr(dofn, "_fn", None)  # of a wrapped function, its own arguments count
        # A class of a function's own is unpickled as itself, with other methods.
        own = vars(type(dofn)).get("process")
        return type(dofn), own, _same_reading(getattr(wrapped, "_argspec_fn", wrapped))

    userstate.get_dofn_specs = _once(userstate.get_dofn_specs, of_dofn)


def _once(ask: Callable[[Any], Any], key_of: Callable[[Any], object]) -> Callable[[Any], Any]:
    known: dict[object, Any] = {}

    @functools.wraps(ask)
    def remembered(asked: Any) -> Any:
        key = key_of(asked)
        if key not in known:
            known[key] = ask(asked)
        return known[key]

    return remembered


def _named(value: object) -> list[tuple[types.ModuleType, str]]:
    """Where a function was imported to."""
    name = value.__name__
    return [(module, name) for module in list(sys.modules.values()) if getattr(module, name, None) is value]


def _remember_options() -> None:
    from apache_beam.options.pipeline_options import PipelineOptions

    make_view = PipelineOptions.view_as
    views: dict[tuple[int, type], tuple[PipelineOptions, object]] = {}

    def view_as(self: PipelineOptions, cls: type) -> PipelineOptions:
        key = id(self._all_options), cls  # all views of one set of options share this
        if key not in views:
            views[key] = make_view(self, cls), self._all_options
        return views[key][0]

    PipelineOptions.view_as = view_as
    PipelineOptions._visible_option_list = lambda self: sorted(vars(self._visible_options))


def _keep_no_origins() -> None:
    """A type hint remembers the stack that it was given on, for messages about hints that do not fit."""
    from apache_beam.typehints.decorators import IOTypeHints

    IOTypeHints._make_origin = classmethod(lambda cls, bases, tb=True, msg=(): [])


def _pickle_small() -> None:
    """What is written reads as ever, but bz2 clears 100 kB for each of 600 functions, not 900, and packs one that it knows no second time.

    And each is pickled once, not twice.
    """
    from apache_beam.internal import cloudpickle_pickler, pickler

    @functools.lru_cache(4096)
    def compress(content: bytes, compresslevel: int) -> bytes:
        return bz2.compress(content, 1)

    cloudpickle_pickler.bz2 = types.SimpleNamespace(
        compress=compress, decompress=functools.lru_cache(4096)(bz2.decompress)
    )
    pickler.roundtrip = lambda value: value  # as a trial, at construction


class _AtOnce(futures.Executor):
    """Does what it is given where it is given."""

    def __init__(self, **of_threads: object) -> None:
        pass

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> futures.Future[Any]:
        done: futures.Future[Any] = futures.Future()
        done.set_result(work(*args, **kwargs))
        return done


def _start_no_threads() -> None:
    """One thread a bundle unpickles it, so that a stuck one is noticed; another samples which step takes the time."""
    from apache_beam.runners.worker import bundle_processor, statesampler

    in_place = types.SimpleNamespace(ThreadPoolExecutor=_AtOnce, TimeoutError=futures.TimeoutError)
    bundle_processor.concurrent = types.SimpleNamespace(futures=in_place)

    def start(self: statesampler.StateSampler) -> None:
        statesampler.set_current_tracker(self)
        self.started = True

    statesampler.StateSampler.start = start
    statesampler.StateSampler.stop = lambda self: statesampler.set_current_tracker(None)


def _count_values_alike() -> None:
    """A side input is weighed for the cache by walking all that it refers to and all modules' globals, 30 ms each."""
    from apache_beam.runners.worker import statecache

    statecache.get_deep_size = lambda *values: 1


def _describe_own_collections() -> None:
    """A stage is told of all the pipeline's collections and coders, of which it names a few, and copies them thrice."""
    from apache_beam.portability.api import beam_fn_api_pb2
    from apache_beam.runners.portability.fn_api_runner.execution import BundleContextManager

    def of_stage(self: BundleContextManager) -> Any:
        whole = self.execution_context.pipeline_components
        descriptor = beam_fn_api_pb2.ProcessBundleDescriptor(
            id=self.bundle_uid,
            state_api_service_descriptor=self.state_api_service_descriptor(),
            timer_api_service_descriptor=self.data_api_service_descriptor(),
        )
        for transform in self.stage.transforms:
            descriptor.transforms[transform.unique_name].CopyFrom(transform)
            for name in (*transform.inputs.values(), *transform.outputs.values()):
                if name in whole.pcollections:
                    descriptor.pcollections[name].CopyFrom(whole.pcollections[name])
        for of_all in ("windowing_strategies", "environments"):
            getattr(descriptor, of_all).MergeFrom(getattr(whole, of_all))
        written = descriptor.SerializeToString().decode("latin-1")
        named = [name for name in whole.coders if name in written]
        while named:
            name = named.pop()
            descriptor.coders[name].CopyFrom(whole.coders[name])
            named += [
                part for part in whole.coders[name].component_coder_ids if part not in descriptor.coders
            ]
        return descriptor

    BundleContextManager._build_process_bundle_descriptor = of_stage

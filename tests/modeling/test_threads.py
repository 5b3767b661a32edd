"""Threads that share a model: each call gives what it gives alone, and leaves the model as it was."""

import asyncio
import contextvars
import functools
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from transformers import PreTrainedConfig

from tests.families.tiny_models import build, collate, sample
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.modeling.module_twins import copied_configs, twin_of
from tprl_hf.pruners import PRUNERS, FastVPruner, NoPruner, RandomPruner, UniformPruner, VisPruner

BUDGETS = ({"keep_ratio": 0.3}, {"num_keep": 5}, {"keep_ratio": 0.8})
NUM_THREADS = 8


def wrapped(family="llava"):
    return TPRLForConditionalGeneration.from_base_model(build(family), latent_dim=8, policy_training={"stage": "lfd"})


@functools.cache
def shared(family="llava"):
    return wrapped(family).eval()


@pytest.fixture
def eager_to_switch():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def state(model):
    """All that lies on modules and configs, but for tensors: attributes, hooks, settings."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key == "rope_deltas":  # transformers' own unpruned `forward` sets it
                continue
            if isinstance(value, PreTrainedConfig):
                value = [(one._attn_implementation, one.to_json_string(use_diff=False)) for one in configs_in(value)]
            elif isinstance(value, dict):
                value = [(inner, id(one)) for inner, one in value.items()]
            elif torch.is_tensor(value):
                value = id(value)
            found[name, key] = value
    return found


def configs_in(config):
    yield config
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            yield from configs_in(getattr(config, name))


def jobs_of(model, batch):
    """Calls that say which tokens stay: all pruners by all budgets, and calls that prune nothing beside them."""

    def prune(name, budget):
        with model.using(PRUNERS[name]()):
            return model.prune(**batch, **budget).keep_mask

    def answer(name, budget):
        with model.using(PRUNERS[name](**budget)):
            return model.generate(**batch, max_new_tokens=3, do_sample=False)

    jobs = [functools.partial(prune, name, budget) for name in PRUNERS for budget in BUDGETS]
    jobs += [functools.partial(answer, name, BUDGETS[0]) for name in ("visionzip", "sparsevlm", "divprune")]
    jobs += [lambda: model.lvlm(**batch).logits] * 4
    jobs += [lambda: model(**batch, prune=False).logits] * 4
    jobs += [lambda: model(**batch, keep_ratio=0.5).keep_mask]
    jobs += [lambda: model.generate(**batch, prune=False, max_new_tokens=3, do_sample=False)]
    return jobs


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_each_call_gives_what_it_gives_alone(family, eager_to_switch):
    model = shared(family)
    batch = collate(family, [sample(family, 1, 1), sample(family, 2, 2)])
    with torch.no_grad():
        model.lvlm(**batch)  # what transformers does once, such as its own hooks, is not the matter
        before = state(model)
        jobs = jobs_of(model, batch)
        alone = [job() for job in jobs]
    start = threading.Barrier(NUM_THREADS)

    def work(number):
        start.wait()
        order = random.Random(number).sample(range(len(jobs)), len(jobs))
        with torch.no_grad():
            return [index for index in order if not torch.equal(jobs[index](), alone[index])]

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        assert list(pool.map(work, range(NUM_THREADS))) == [[]] * NUM_THREADS
    assert state(model) == before


@pytest.mark.parametrize("pruner", [VisPruner, FastVPruner])
@torch.no_grad()
def test_one_who_waits_inside_is_not_seen(pruner):
    """A thread is held in the middle of a pass that reads attention; meanwhile the model is as ever."""
    model = wrapped().eval()
    batch = collate("llava", [sample("llava", 1, 1)])
    inside, leave = threading.Event(), threading.Event()
    expected = model.lvlm(**batch).logits
    before = state(model)
    part = model.lvlm.model.vision_tower if pruner is VisPruner else model.lvlm.model.language_model

    def hold(module, args):
        if threading.current_thread().name == "held" and not inside.is_set():
            inside.set()
            assert leave.wait(60)

    hook = next(module for module in part.modules() if type(module).__name__.endswith("Attention"))
    hook = hook.register_forward_pre_hook(hold)
    held = threading.Thread(target=lambda: model.prune(**batch, keep_ratio=0.5), name="held")
    with model.using(pruner()):
        held.start()
        assert inside.wait(60)
    try:
        hook.remove()
        assert state(model) == before
        assert torch.equal(model.lvlm(**batch).logits, expected)
    finally:
        leave.set()
        held.join()


@torch.no_grad()
def test_a_failed_call_leaves_all_as_it_was():
    model = wrapped().eval()
    batch = collate("llava", [sample("llava", 1, 1)])
    model.lvlm(**batch)
    before = state(model)
    layer = model.lvlm.model.vision_tower.encoder.layers[0].self_attn
    for broken in (layer, model.lvlm.model.language_model.layers[0].mlp):

        def fail(module, args):
            raise RuntimeError("no memory")

        hook = broken.register_forward_pre_hook(fail)
        with (
            pytest.raises(RuntimeError, match="no memory"),
            model.using(VisPruner() if broken is layer else FastVPruner()),
        ):
            model.prune(**batch, keep_ratio=0.5)
        hook.remove()
    assert state(model) == before


def test_using_belongs_to_its_thread():
    model = shared()
    own = type(model.pruner)
    opened, done = threading.Event(), threading.Event()

    def other():
        with model.using(UniformPruner()):
            opened.set()
            assert done.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    assert opened.wait(60)
    assert type(model.pruner) is own
    with ThreadPoolExecutor(1) as pool:  # started while the block is open, which is not of the main thread
        assert pool.submit(lambda: type(model.pruner)).result() is own
    done.set()
    thread.join()


def test_threads_started_inside_a_block_of_the_main_thread_have_its_pruner():
    model, other = shared(), wrapped()
    seen = lambda: type(model.pruner)  # noqa: E731
    with ThreadPoolExecutor(1) as older:
        own = older.submit(seen).result()
        with model.using(UniformPruner()):
            assert older.submit(seen).result() is own
            assert older.submit(contextvars.copy_context().run, seen).result() is UniformPruner
            with ThreadPoolExecutor(1) as inner, model.using(NoPruner()):
                assert inner.submit(seen).result() is NoPruner
                assert inner.submit(lambda: type(other.pruner)).result() is own

                def with_its_own():
                    with model.using(RandomPruner()):
                        return seen()

                assert inner.submit(with_its_own).result() is RandomPruner
            assert seen() is UniformPruner
    assert seen() is own


def test_using_belongs_to_its_task():
    model = shared()

    async def use(pruner):
        with model.using(pruner()):
            await asyncio.sleep(0.01)
            return type(model.pruner), await asyncio.to_thread(lambda: type(model.pruner))

    async def both():
        return await asyncio.gather(use(UniformPruner), use(NoPruner))

    own = type(model.pruner)
    assert asyncio.run(both()) == [(UniformPruner,) * 2, (NoPruner,) * 2]
    assert type(model.pruner) is own


def test_a_generator_that_is_closed_elsewhere_closes_its_block():
    model = shared()
    own = type(model.pruner)

    def held():
        with model.using(UniformPruner()):
            yield type(model.pruner)

    generator = held()
    context = contextvars.copy_context()
    assert context.run(next, generator) is UniformPruner
    generator.close()
    assert type(model.pruner) is own
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: type(model.pruner)).result() is own


@torch.no_grad()
def test_one_pruner_serves_two_models():
    batch = collate("llava", [sample("llava", 1, 1)])
    models = [wrapped().eval(), wrapped().eval()]
    for weight in models[1].lvlm.parameters():
        weight.data = weight.data.flip(0)
    pruner = FastVPruner(keep_ratio=0.4)
    alone = []
    for model in models:
        with model.using(FastVPruner(keep_ratio=0.4)):
            alone.append(model.prune(**batch).scores)
    assert not torch.equal(*alone)
    with models[0].using(pruner), models[1].using(pruner):
        assert all(torch.equal(model.prune(**batch).scores, one) for model, one in zip(models, alone, strict=True))


@torch.no_grad()
def test_a_twin_shares_weights_and_nothing_else():
    base = build("llava")
    tower = base.model.vision_tower
    calls = []

    class Counts(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    layer = tower.encoder.layers[0].self_attn
    add_hook_to_module(layer, Counts())  # puts a `forward` of its own on the module
    tower.encoder.layers[1].compile(backend="eager")
    base.model.vision_tower = torch.compile(tower, backend="eager")
    twin = twin_of(base.model, copied_configs(tower.config, "eager")).vision_tower
    pixels = collate("llava", [sample("llava", 1, 1)])["pixel_values"]
    expected = tower(pixels).last_hidden_state
    assert (twin(pixels).last_hidden_state - expected).abs().max() < 1e-5
    assert calls == [layer, twin.encoder.layers[0].self_attn]
    assert twin.encoder.layers[0].self_attn.config._attn_implementation == "eager"
    assert tower.config._attn_implementation == "sdpa"
    for parameter in tower.parameters():
        parameter.data.mul_(0)
    assert all(not parameter.any() for parameter in twin.parameters())

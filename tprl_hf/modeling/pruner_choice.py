"""Which pruner a model uses, and which budget a call has."""

import copy
import inspect
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakSet

from torch import Tensor
from transformers import PreTrainedModel

from .budget import Budget, resolve_choice
from .checkpoint_checks import refuse_untrained
from .pruner_classes import PRUNER_CLASSES
from .pruning_policy import PruningPolicy
from .token_autoencoder import TokenAutoencoder
from .token_pruner import LearnedPruner, TokenPruner
from .values import did_you_mean, wrong


def refuse_unknown_pruner(name: Any, known: Mapping[str, type[TokenPruner]]) -> None:
    """Raises `ValueError` for a name that no pruner has."""
    if not isinstance(name, str) or name not in known:
        hint = did_you_mean(name, known)
        raise ValueError(f"There is no pruner {name!r}; choose from {', '.join(sorted(known))}. {hint}".strip())


def arguments_of(pruner_class: type[TokenPruner]) -> list[str]:
    """Names of the settings that a class of pruners takes, those of its bases among them."""
    names: list[str] = []
    for cls in pruner_class.__mro__:
        if "__init__" in vars(cls):
            parameters = list(inspect.signature(vars(cls)["__init__"]).parameters.values())[1:]
            kinds = [parameter.kind for parameter in parameters]
            own = [one for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
            names += [one.name for one in own]
            if inspect.Parameter.VAR_KEYWORD not in kinds:
                break
    return names


def name_with_settings(pruner: Mapping[str, Any]) -> str:
    """The pruner that a config names, without its budget, as commands and results write it.

    Example:

    ```python
    >>> name_with_settings({"name": "fastv", "layer": 3, "keep_ratio": 0.5})
    'fastv:layer=3'
    ```
    """
    no_settings = {"name", "seed", *arguments_of(TokenPruner)}
    settings = {key: value for key, value in pruner.items() if key not in no_settings}
    texts = [value if isinstance(value, str) else json.dumps(value) for value in settings.values()]
    return ":".join([pruner["name"], *map("=".join, zip(settings, texts, strict=True))])


@dataclass(frozen=True, eq=False)
class Use:
    """A `with model.using(pruner)` that is open. `older` are the threads that were there before it."""

    model: Any
    pruner: TokenPruner
    older: WeakSet[threading.Thread] = field(default_factory=lambda: WeakSet(threading.enumerate()))


# Of the current thread or task.
_uses: ContextVar[tuple[Use, ...]] = ContextVar("tprl_uses", default=())
# Of the main thread, for threads that it starts inside: these begin without any context.
_main_uses: list[Use] = []


class PrunerChoiceMixin:
    """The part of [`TPRLForConditionalGeneration`] that knows its pruner."""

    config: Any
    lvlm: PreTrainedModel
    policy: PruningPolicy
    autoencoder: TokenAutoencoder
    # Which pruners a config can name.
    pruner_classes: ClassVar[Mapping[str, type[TokenPruner]]] = PRUNER_CLASSES
    # The one of a new model that is given a budget, and has no trained policy.
    default_pruner: ClassVar[str | None] = None

    @classmethod
    def takes_default_pruner(cls, settings: Mapping[str, Any]) -> bool:
        """Whether a new model with these fields of [`TPRLConfig`] would keep random tokens otherwise."""
        chooses = settings.get("pruner") is not None or settings.get("policy_training") is not None
        has_budget = settings.get("keep_ratio") is not None or settings.get("num_keep") is not None
        return cls.default_pruner is not None and has_budget and not chooses

    def _init_pruner(self) -> None:
        named = copy.deepcopy(self.config.pruner)
        self._own_pruner = None if named is None else self._make_pruner(**named)
        self._own_name = named

    def _named_pruner(self) -> TokenPruner | None:
        """That of `set_pruner`, which the config names; made anew where the config was edited since."""
        if self.config.pruner != self._own_name:
            self.config.check()
            self._init_pruner()
        return self._own_pruner

    def _check_config(self) -> None:
        """Raises `ValueError` for a field that is not what it must be; they can be set at any time."""
        self.config.check()

    @property
    def pruner(self) -> TokenPruner:
        """The pruner in use: that of `using`, else that of `set_pruner`, else the policy."""
        return self._chosen_pruner() or self.learned_pruner()

    def _chosen_pruner(self) -> TokenPruner | None:
        """That of `using`, else that of `set_pruner`."""
        own = [use.pruner for use in _uses.get() if use.model is self]
        thread = threading.current_thread()
        main = [use.pruner for use in tuple(_main_uses) if use.model is self and thread not in use.older]
        return (main + own)[-1] if main or own else self._named_pruner()

    def learned_pruner(self, **budget) -> LearnedPruner:
        """The policy as a pruner, whichever pruner is in use. `budget` as in [`TokenPruner`]."""
        config = self.config
        return LearnedPruner(self.policy, self.autoencoder, config.num_steps, config.threshold_keep_ratio, **budget)

    def set_pruner(self, pruner: str | TokenPruner | None, **settings) -> None:
        r"""
        Lets a pruner that needs no training choose the tokens from now on. It is saved with the model, comes back with
        `from_pretrained`, and travels with the checkpoint's code.

        Args:
            pruner (`str` or [`TokenPruner`], *optional*): a name in `tprl_hf.pruners.PRUNERS`, or a pruner of one of
                these classes. `None` or `"learned"` gives the choice back to the policy.
            settings: arguments of the named pruner; a budget (`keep_ratio`, ...) among them goes before the config's.

        Raises:
            `ValueError`: for a pruner that is not in the table, and for one that does not work with this base model.

        Example:

        ```python
        >>> model.set_pruner("divprune", keep_ratio=1 / 3)
        >>> model.save_pretrained("llava-divprune")
        ```
        """
        if isinstance(pruner, TokenPruner):
            if settings:
                raise ValueError(f"Settings {sorted(settings)} go to a pruner that is named, not to one that is made.")
            names = [name for name, one in self.pruner_classes.items() if one is type(pruner)]
            if not names:
                raise ValueError(
                    f"{type(pruner).__name__} is not in tprl_hf.pruners.PRUNERS, so a checkpoint could not name it. "
                    "Put it there under a name of yours, or use it inside `with model.using(pruner)`."
                )
            pruner.attach(self.lvlm)
            self._own_pruner, self.config.pruner = pruner, {"name": names[0], **pruner.settings()}
            self._own_name = copy.deepcopy(self.config.pruner)
        elif pruner is None or pruner == "learned":
            if settings:
                raise ValueError(
                    f"The policy has its settings in the model's config: set {', '.join(map(repr, settings))} there."
                )
            self._own_pruner = self._own_name = self.config.pruner = None
        else:
            self.set_pruner(self._make_pruner(pruner, **settings))

    def _make_pruner(self, name: str, **settings) -> TokenPruner:
        refuse_unknown_pruner(name, self.pruner_classes)
        pruner_class = self.pruner_classes[name]
        known = arguments_of(pruner_class)
        for setting in settings:
            if setting not in known:
                hint = did_you_mean(setting, known) or f"It has {', '.join(known) or 'none'}."
                raise ValueError(f"The pruner {name!r} has no setting {setting!r}. {hint}")
        pruner = pruner_class(**settings)
        pruner.attach(self.lvlm)
        return pruner

    @contextmanager
    def using(self, pruner: TokenPruner) -> Iterator[Any]:
        """
        Inside the `with`, `pruner` chooses the tokens; afterwards all is as before. It is not saved.

        It holds for the thread or asyncio task that opened it, and for what that one calls: others may use the same
        model with pruners of their own. Threads that are started inside a block of the main thread have its pruner
        too, until they open a block themselves; in other cases `contextvars.copy_context().run` hands it on.

        Raises:
            `ValueError`: for what is not a pruner, and for a base model with which its method does not work.
        """
        if not isinstance(pruner, TokenPruner):
            raise wrong("pruner", pruner, "a TokenPruner, as in tprl_hf.pruners", "A name is for set_pruner.")
        pruner.attach(self.lvlm)
        use = Use(self, pruner)
        is_main = threading.current_thread() is threading.main_thread()
        _uses.set((*_uses.get(), use))
        if is_main:
            _main_uses.append(use)
        try:
            yield self
        finally:
            if is_main:
                _main_uses.remove(use)
            # not by a token, which a generator that is closed elsewhere could not hand back
            _uses.set(tuple(one for one in _uses.get() if one is not use))

    def _choice(
        self,
        keep_ratio: float | None,
        num_keep: int | None,
        threshold: float | None,
        prune: bool | None,
        keep_mask: Tensor | None,
    ) -> Budget | Tensor | None:
        """What a call does, see [`resolve_choice`]; an untrained policy is refused."""
        self._check_config()
        chosen = self._chosen_pruner()
        budget = None if chosen is None else chosen.budget
        call = (keep_ratio, num_keep, threshold, prune, keep_mask)
        choice = resolve_choice(*call, budget, chosen is not None, self.config)
        if chosen is None and isinstance(choice, Budget) and choice.keep_ratio != 1:
            refuse_untrained(self.config)
        return choice

    def _looks(self, choice: Budget | Tensor | None) -> bool:
        """Whether this call's pruner reads the tower's attention."""
        return isinstance(choice, Budget) and self.pruner.needs_attention

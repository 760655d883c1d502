"""Keeps what the policy's and the reference's forward pass return, without a pass of its own."""

from types import TracebackType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["ForwardRecorder"]


class ForwardRecorder:
    """Context manager: inside it, the first output of the policy and of the reference are kept.

    The policy is hooked on its outermost module, since wrappers (DDP) may call inner modules in
    their own way. The reference may be a module of its own, the same module (an adapter switched
    off for a second pass), or the module inside the policy's wrapper; in the last case its calls
    on behalf of the wrapper are not the reference. Hooks are gone after the block, whatever
    happened in it.

    Args:
        policy: Module that the policy's forward pass calls.
        reference: Module that the reference's forward pass calls.

    Attributes:
        policy_output: What the policy returned, or None if it was not called.
        reference_output: What the reference returned, or None if it was not called.

    Example:
        >>> import torch
        >>> policy, reference = nn.Identity(), nn.Identity()
        >>> with ForwardRecorder(policy, reference) as recorder:
        ...     _ = policy(torch.tensor(1.0)), reference(torch.tensor(2.0))
        >>> recorder.policy_output.item(), recorder.reference_output.item()
        (1.0, 2.0)
    """

    def __init__(self, policy: nn.Module, reference: nn.Module) -> None:
        self.policy_output: Any = None
        self.reference_output: Any = None
        self._policy = policy
        self._reference = reference
        self._depth = 0  # > 0 while the policy's own forward runs
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "ForwardRecorder":
        self._handles = [
            self._policy.register_forward_pre_hook(self._before_policy),
            self._policy.register_forward_hook(self._after_policy),
        ]
        if self._reference is not self._policy:
            self._handles.append(self._reference.register_forward_hook(self._after_reference))
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _before_policy(self, module: nn.Module, args: Any) -> None:
        self._depth += 1

    def _after_policy(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if self.policy_output is None:
            self.policy_output = output
        elif self._reference is self._policy and self.reference_output is None:
            self.reference_output = output

    def _after_reference(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._depth == 0 and self.reference_output is None:
            self.reference_output = output

"""The node token in the agent: it comes from the heartbeat, which alone can register, over a private line."""

from collections.abc import Callable

from aitbc_miner.channel import Channel
from aitbc_miner.coordinator import Coordinator
from aitbc_miner.credentials import digest
from aitbc_miner.messages import NodeToken, PrivateLine, TokenWanted


class TokenLine:
    """Asks for tokens and has the client use what comes. `mask` keeps a token out of the log."""

    def __init__(
        self, line: Channel[PrivateLine], coordinator: Coordinator, mask: Callable[[str], None]
    ) -> None:
        self._line = line
        self._coordinator = coordinator
        self._mask = mask
        self._token: str | None = None

    def __bool__(self) -> bool:
        return self._token is not None

    def fileno(self) -> int:
        """Give the descriptor that can be read when a token has come."""
        return self._line.fileno()

    def ask(self) -> None:
        """Ask for the first token."""
        self._line.send(TokenWanted())

    def refused(self) -> None:
        """Ask for another token, since the coordinator does not accept this one."""
        if self._token is not None:
            self._line.send(TokenWanted(refused=digest(self._token)))

    def receive(self) -> bool:
        """Use what has come; whether a token was among it.

        Raises:
            ChannelError: the heartbeat, or who started us, is gone.
        """
        tokens = [word.token for word in self._line.receive() if isinstance(word, NodeToken)]
        for token in tokens:
            self._token = token
            self._mask(token)
            self._coordinator.use_token(token)
        return bool(tokens)

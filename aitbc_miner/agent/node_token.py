"""The agent's line to the heartbeat, which registers the node and sends the node token over this line.

The agent also tells the heartbeat the number of its jobs, and when to send a heartbeat at once.
"""

from aitbc_miner.coordinator.interface import Coordinator
from aitbc_miner.identity.credentials import digest
from aitbc_miner.ipc.channel import Channel
from aitbc_miner.ipc.messages import Beaten, BeatWanted, Load, NodeToken, PrivateLine, TokenWanted
from aitbc_miner.util import log


class TokenLine:
    """Asks for tokens and gives each new token to the coordinator's client."""

    def __init__(self, line: Channel[PrivateLine], coordinator: Coordinator) -> None:
        self._line = line
        self._coordinator = coordinator
        self._token: str | None = None
        self._load: int | None = None
        self.forgotten = False
        """Whether the coordinator has forgotten this node and its jobs. The reader of the flag resets it."""
        self.beaten = False
        """Whether the coordinator has had the heartbeat of `want_beat`. The reader of the flag resets it."""

    def __bool__(self) -> bool:
        return self._token is not None

    def fileno(self) -> int:
        """Give the descriptor, readable when the heartbeat has sent a message."""
        return self._line.fileno()

    def ask(self) -> None:
        """Ask for the first token."""
        self._line.send(TokenWanted())

    def refused(self) -> None:
        """Ask for a new token, since the coordinator does not accept the present token."""
        if self._token is not None:
            self._line.send(TokenWanted(refused=digest(self._token)))

    def tell_load(self, inflight: int) -> None:
        """Tell the heartbeat the number of undone jobs, if changed."""
        if inflight != self._load:
            self._load = inflight
            self._line.send(Load(inflight))

    def want_beat(self) -> None:
        """Have a heartbeat sent now."""
        self._line.send(BeatWanted())

    def receive(self) -> bool:
        """Read the messages; True after a new token or a heartbeat: the coordinator may have news for us.

        Raises:
            ChannelError: the heartbeat or the supervisor is gone.
        """
        words = self._line.receive()
        for word in words:
            if isinstance(word, NodeToken):
                self._token = word.token
                log.mask(word.token)
                self._coordinator.use_token(word.token)
                self.forgotten |= word.forgotten
            self.beaten |= isinstance(word, Beaten)
        return any(isinstance(word, NodeToken | Beaten) for word in words)

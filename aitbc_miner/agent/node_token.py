"""The agent's line to the heartbeat, which alone can register: the node token comes this way.

The heartbeat is also told how much there is to do, and when the coordinator should hear of it.
"""

from aitbc_miner.coordinator.interface import Coordinator
from aitbc_miner.identity.credentials import digest
from aitbc_miner.ipc.channel import Channel
from aitbc_miner.ipc.messages import Beaten, BeatWanted, Load, NodeToken, PrivateLine, TokenWanted
from aitbc_miner.util import log


class TokenLine:
    """Asks for tokens and has the client use what comes."""

    def __init__(self, line: Channel[PrivateLine], coordinator: Coordinator) -> None:
        self._line = line
        self._coordinator = coordinator
        self._token: str | None = None
        self._load: int | None = None
        self.forgotten = False
        """Whether the coordinator has forgotten this node, and so its jobs, since that was last looked at."""
        self.beaten = False
        """Whether it has had a heartbeat that was wanted, likewise."""

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

    def tell_load(self, inflight: int) -> None:
        """Say how many jobs are ours to do, if that has changed."""
        if inflight != self._load:
            self._load = inflight
            self._line.send(Load(inflight))

    def want_beat(self) -> None:
        """Have a heartbeat sent now."""
        self._line.send(BeatWanted())

    def receive(self) -> bool:
        """Use what has come; whether the coordinator may have more for us now: for a token, or a heartbeat.

        Raises:
            ChannelError: the heartbeat, or who started us, is gone.
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

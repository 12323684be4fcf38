"""How a mailbox lies in memory, through which compute threads are handed their work (interpreter.py says how they wait there).

Byte offsets: the generation, rung by the host; sleepers; whether to stop; the eventfd; the call: program, first instruction,
end instruction, state, barrier, scratch, scratch stride, and the barrier of the call's end. (That is
not the program's own, since the host may let go of the program while others are still on their way out of it.) What threads
write and what the host writes lie on different cache lines.
"""

__all__ = ["MAILBOX_BYTES", "MAILBOX_CALL", "MAILBOX_EVENTFD", "MAILBOX_SLEEPERS", "MAILBOX_STOP"]

MAILBOX_BYTES = 320
MAILBOX_SLEEPERS, MAILBOX_STOP, MAILBOX_EVENTFD, MAILBOX_CALL = 128, 192, 200, 256

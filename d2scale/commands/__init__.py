"""One module a command: its arguments and its printing. The work is done elsewhere."""

from d2scale.commands import (
    benchmark,
    demo,
    doctor,
    memory,
    plan,
    report,
    reproduce,
    train,
    visualize,
)

# In the order in which the help lists them.
COMMANDS = (plan, memory, train, reproduce, report, visualize, benchmark, demo, doctor)

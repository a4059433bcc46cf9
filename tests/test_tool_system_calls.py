"""The filter of system calls, run by an interpreter of the kernel's classic BPF; what it keeps out of a real sandbox
is in test_tool_python_attacks.py."""

import errno
import struct

import pytest

from arpo_trl.tools.python import system_calls

ALLOW, ABSENT, REFUSE, KILL = 0x7FFF0000, 0x50000 | errno.ENOSYS, 0x50000 | errno.EPERM, 0x80000000
X86, ARM = (0xC000003E, "x86_64"), (0xC00000B7, "aarch64")


def answer(machine: tuple[int, str], number: int, *arguments: int, architecture: int | None = None) -> int:
    """What the filter for `machine` answers to the system call `number`."""
    data = struct.pack("=IIQ6Q", number, architecture or machine[0], 0, *arguments, *[0] * (6 - len(arguments)))
    lines = list(struct.iter_unpack("=HBBI", system_calls.filter_program(machine[1])))
    value = line = 0
    while True:
        operation, yes, no, operand = lines[line]
        line += 1
        if operation == 0x20:
            (value,) = struct.unpack_from("=I", data, operand)
        elif operation == 0x54:
            value &= operand
        elif operation == 0x15:
            line += yes if value == operand else no
        elif operation == 0x35:
            line += yes if value >= operand else no
        else:
            assert operation == 0x06
            return operand


@pytest.mark.parametrize("machine", [X86, ARM])
def test_a_call_is_allowed_if_and_only_if_it_is_listed(machine):
    column = system_calls.MACHINES[machine[1]][1]
    rows = [row.split() for line in system_calls.ALLOWED.splitlines() if line[:1] != "#" for row in line.split(",")]
    listed = {row[0]: int(row[1 + column]) for row in rows if row and row[1 + column] != "-"}
    assert len(set(listed.values())) == len(listed) > 150
    free = {number for name, number in listed.items() if name not in system_calls.ARGUMENTS}
    checked = {listed[name] for name in system_calls.ARGUMENTS}
    for number in set(range(463)) - checked:
        expected = ALLOW if number in free else ABSENT if number in (435, [73, 32][column]) else REFUSE
        assert answer(machine, number) == expected, number
    for number in [463, 500, 0x3FFFFFFF]:
        assert answer(machine, number) == ABSENT
    for number in [0x40000000, 0x40000001, 0xFFFFFFFF]:
        assert answer(machine, number) == REFUSE


@pytest.mark.parametrize("machine", [X86, ARM])
def test_calls_of_another_architecture_end_the_process(machine):
    assert answer(machine, 1, architecture=0x40000003) == KILL
    assert answer(machine, 1, architecture=(ARM if machine is X86 else X86)[0]) == KILL


@pytest.mark.parametrize(
    ("number", "arguments", "expected"),
    [
        (56, (0x11,), ALLOW),  # clone: fork
        (56, (0x3D0F00,), ALLOW),  # a thread
        (56, (0x10000011,), REFUSE),  # CLONE_NEWUSER
        (56, (0x00020011,), REFUSE),  # CLONE_NEWNS
        (9, (0, 4096, 3, 0x22), ALLOW),  # mmap: private anonymous
        (9, (0, 4096, 3, 0x01, 3), ALLOW),  # shared, of a file
        (9, (0, 4096, 3, 0x02, 3), ALLOW),  # private, of a file
        (9, (0, 4096, 3, 0x21), REFUSE),  # shared anonymous
        (9, (0, 4096, 3, 0x23), REFUSE),  # the same, MAP_SHARED_VALIDATE
        (9, (0, 4096, 3, 0x40022), REFUSE),  # huge pages
        (53, (1, 1), ALLOW),  # socketpair: AF_UNIX
        (53, (30, 1), REFUSE),
        (72, (3, 6), ALLOW),  # fcntl: F_SETLK
        (72, (3, 1031), REFUSE),  # F_SETPIPE_SZ
        (72, (3, 1024), REFUSE),  # F_SETLEASE
        (157, (4, 1), REFUSE),  # prctl: PR_SET_DUMPABLE
        (157, (4, 0), REFUSE),
        (157, (15,), ALLOW),  # PR_SET_NAME
        (302, (0, 7), ALLOW),  # prlimit64: RLIMIT_NOFILE
        (302, (0, 4), REFUSE),  # RLIMIT_CORE
        (160, (4,), REFUSE),
        (16, (1, 0x5401), ALLOW),  # ioctl: TCGETS
        (16, (1, 0x5412), REFUSE),  # TIOCSTI
        (28, (0, 4096, 4), ALLOW),  # madvise: MADV_DONTNEED
        (28, (0, 4096, 12), REFUSE),  # MADV_MERGEABLE
    ],
)
def test_arguments_on_x86_64(number, arguments, expected):
    assert answer(X86, number, *arguments) == expected


@pytest.mark.parametrize(
    ("number", "arguments", "expected"),
    [
        (220, (0x11,), ALLOW),  # clone
        (220, (0x20000011,), REFUSE),  # CLONE_NEWPID
        (222, (0, 4096, 3, 0x22), ALLOW),  # mmap
        (222, (0, 4096, 3, 0x21), REFUSE),
        (261, (0, 4), REFUSE),  # prlimit64
        (167, (4, 1), REFUSE),  # prctl
    ],
)
def test_arguments_on_aarch64(number, arguments, expected):
    assert answer(ARM, number, *arguments) == expected

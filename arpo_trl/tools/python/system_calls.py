"""The system calls that a call of [`~arpo_trl.tools.python.PythonSandbox`] may make, as a seccomp filter.

The list says what is allowed, so that what Linux adds later is refused. Left out is what calculations never need and
- what takes from a store that all processes of the machine, or of the user, share and whose use cannot be counted
  here: asynchronous I/O, inotify and fanotify, message queues, keyrings, leases and locks on files, huge pages,
  real-time priority, larger pipes, the flushing of all disks;
- memory that belongs to no process: `memfd_create`, System V, shared anonymous mappings, pages that `vmsplice` and
  `tee` put into pipes, buffers and descriptors that `sendmsg` leaves in a socket;
- what looks out of the sandbox or undoes it: sockets, namespaces, mounts, `ptrace`, other processes' memory, `bpf`,
  `io_uring`, `userfaultfd`, and being dumped to a program of the host again.

What this module does NOT do: install the filter, which only the process that is to be filtered can do, or limit what
the allowed calls consume; both are the worker's part.
"""

import errno
import struct

#         AUDIT_ARCH, column of the table below
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

# name, number on x86_64, number on aarch64, which lacks some of the old ones
ALLOWED = """
# Files
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69,
pwritev 296 70, preadv2 327 286, pwritev2 328 287, open 2 -, openat 257 56, openat2 437 437, creat 85 -,
close 3 57, close_range 436 436, lseek 8 62, dup 32 23, dup2 33 -, dup3 292 24, fcntl 72 25, ioctl 16 29,
sendfile 40 71, copy_file_range 326 285, fallocate 285 47, truncate 76 45, ftruncate 77 46, fsync 74 82,
fdatasync 75 83
# Directories and what is known of files
stat 4 -, lstat 6 -, fstat 5 80, newfstatat 262 79, statx 332 291, statfs 137 43, fstatfs 138 44,
access 21 -, faccessat 269 48, faccessat2 439 439, readlink 89 -, readlinkat 267 78, getdents 78 -,
getdents64 217 61, getcwd 79 17, chdir 80 49, fchdir 81 50, mkdir 83 -, mkdirat 258 34, rmdir 84 -,
rename 82 -, renameat 264 38, renameat2 316 276, link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36,
unlink 87 -, unlinkat 263 35, mknod 133 -, mknodat 259 33, umask 95 166, chmod 90 -, fchmod 91 52,
fchmodat 268 53, chown 92 -, fchown 93 55, lchown 94 -, fchownat 260 54, utime 132 -, utimes 235 -,
utimensat 280 88, futimesat 261 -, getxattr 191 8, lgetxattr 192 9, fgetxattr 193 10, listxattr 194 11,
llistxattr 195 12, flistxattr 196 13, fchmodat2 452 452
# Pipes, pairs of sockets, waiting
pipe 22 -, pipe2 293 59, socketpair 53 199, sendto 44 206, recvfrom 45 207, shutdown 48 210,
getsockopt 55 209, getsockname 51 204, getpeername 52 205, select 23 -, pselect6 270 72, poll 7 -,
ppoll 271 73, epoll_create 213 -, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -,
epoll_pwait 281 22, epoll_pwait2 441 441, eventfd 284 -, eventfd2 290 19
# Memory
brk 12 214, mmap 9 222, munmap 11 215, mremap 25 216, mprotect 10 226, madvise 28 233, msync 26 227,
membarrier 324 283, pkey_alloc 330 289, pkey_free 331 290, pkey_mprotect 329 288, get_mempolicy 239 236,
mseal 462 462
# Processes and threads
clone 56 220, fork 57 -, vfork 58 -, execve 59 221, exit 60 93, exit_group 231 94, wait4 61 260,
waitid 247 95, kill 62 129, tkill 200 130, tgkill 234 131, pidfd_open 434 434, pidfd_send_signal 424 424,
futex 202 98, futex_waitv 449 449, set_robust_list 273 99, get_robust_list 274 100, set_tid_address 218 96,
rseq 334 293, arch_prctl 158 -, prctl 157 167, restart_syscall 219 128, sched_yield 24 124,
sched_getaffinity 204 123, sched_setaffinity 203 122, sched_getparam 143 121, sched_getscheduler 145 120,
sched_get_priority_max 146 125, sched_get_priority_min 147 126, sched_rr_get_interval 148 127,
getpriority 140 141, setpriority 141 140, getcpu 309 168, futex_wake 454 454, futex_wait 455 455,
futex_requeue 456 456
# Signals
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136,
rt_sigtimedwait 128 137, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, rt_sigsuspend 130 133,
sigaltstack 131 132, pause 34 -, alarm 37 -, getitimer 36 102, setitimer 38 103
# Clocks
nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169,
time 201 -, times 100 153
# Who and where
getpid 39 172, getppid 110 173, gettid 186 178, getpgid 121 155, getpgrp 111 -, setpgid 109 154,
getsid 124 156, setsid 112 157, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177,
getresuid 118 148, getresgid 120 150, getgroups 115 158, capget 125 90, getrlimit 97 163, setrlimit 160 164,
prlimit64 302 261, getrusage 98 165, sysinfo 99 179, uname 63 160, getrandom 318 278
"""

_NEWEST = 462  # number of the newest call that the lists here were made with
_CLONE_ANY_NAMESPACE = 0x7E020000
_MAP_SHARED, _MAP_ANONYMOUS, _MAP_HUGETLB = 0x01, 0x20, 0x40000
_RLIMIT_CORE = 4

# A call of these names is allowed if one argument, under a mask, is one of the values: name: (argument, mask, values)
_ALL = 0xFFFFFFFF
ARGUMENTS: dict[str, tuple[int, int, list[int]]] = {
    "clone": (0, _CLONE_ANY_NAMESPACE, [0]),
    # Shared anonymous memory stays when no process has it in its page tables, so it would not be counted.
    "mmap": (3, _MAP_SHARED | _MAP_ANONYMOUS | _MAP_HUGETLB, [0, _MAP_SHARED, _MAP_ANONYMOUS]),
    "madvise": (
        2,
        _ALL,
        [*range(5), *range(8, 12), *range(14, 20), 22, 23, 25, 102, 103],
    ),  # no merging, no paging out
    "socketpair": (0, _ALL, [1]),  # AF_UNIX
    # descriptors and flags (0-4), record locks, which SQLite needs (5-7, 36-38), F_DUPFD_CLOEXEC, F_GETPIPE_SZ
    "fcntl": (1, _ALL, [*range(8), 36, 37, 38, 1030, 1032]),
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
    "ioctl": (1, _ALL, [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451]),
    # names, signal at the parent's death, timer slack, no new privileges, and questions: not PR_SET_DUMPABLE
    "prctl": (0, _ALL, [1, 2, 3, 15, 16, 21, 23, 29, 30, 38, 39, 0x53564D41]),
    # The worker's limit on core dumps must stay: 1, unlike 0, also stops those that go to a program of the host.
    "setrlimit": (0, _ALL, [limit for limit in range(16) if limit != _RLIMIT_CORE]),
    "prlimit64": (1, _ALL, [limit for limit in range(16) if limit != _RLIMIT_CORE]),
}

# Answered as by a kernel that lacks them: libc then uses `clone`, whose flags do not lie behind a pointer as those of
# `clone3` do, and libraries do without the locks of `flock`, which also hold on files that may only be read.
ABSENT = "clone3 435 435, flock 73 32"


def filter_program(machine: str) -> bytes:
    """The filter as a program of the kernel's classic BPF.

    Args:
        machine (`str`): One of `MACHINES`, as `os.uname().machine` names it.

    Returns:
        `bytes`: Instructions of 8 bytes each. What is not allowed is answered with EPERM, what is newer than these
        lists with ENOSYS, and a call of another architecture ends the process.
    """
    architecture, column = MACHINES[machine]
    allowed, absent = _numbers(ALLOWED, column), _numbers(ABSENT, column)
    checked = {name: rule for name, rule in ARGUMENTS.items() if name in allowed}
    load, equal, at_least, bits, answer = 0x20, 0x15, 0x35, 0x54, 0x06
    # (operation, operand, label to go to if true, else); None goes to the next line
    lines: list[tuple[int, int, str | None, str | None]] = [
        (load, 4, None, None),
        (equal, architecture, None, "kill"),
        (load, 0, None, None),
        (at_least, 0x40000000, "deny", None),  # x32: the same calls under other numbers
        (at_least, _NEWEST + 1, "absent", None),
        *[(equal, number, "absent", None) for number in absent.values()],
        *[(equal, allowed[name], name, None) for name in checked],
    ]
    # From the highest run of consecutive numbers to the lowest: the first comparison that holds decides.
    for first, last in _runs(set(allowed.values())):
        lines += [(at_least, last + 1, "deny", None), (at_least, first, "allow", None)]
    lines.append((equal, _ALL, "deny", "deny"))
    labels = {}
    for name, (argument, mask, values) in checked.items():
        labels[name] = len(lines)
        lines += [(load, 16 + 8 * argument, None, None), (bits, mask, None, None)]
        lines += [(equal, value, "allow", None) for value in values]
        lines.append((equal, values[-1], "allow", "deny"))
    ends = {"allow": 0x7FFF0000, "deny": 0x50000 | errno.EPERM, "absent": 0x50000 | errno.ENOSYS, "kill": 0x80000000}
    labels |= {label: len(lines) + i for i, label in enumerate(ends)}
    return b"".join(
        struct.pack("=HBBI", op, labels[yes] - i - 1 if yes else 0, labels[no] - i - 1 if no else 0, operand)
        for i, (op, operand, yes, no) in enumerate(lines)
    ) + b"".join(struct.pack("=HBBI", answer, 0, 0, value) for value in ends.values())


def _numbers(table: str, column: int) -> dict[str, int]:
    rows = [row.split() for line in table.splitlines() if not line.startswith("#") for row in line.split(",")]
    return {row[0]: int(row[1 + column]) for row in rows if row and row[1 + column] != "-"}


def _runs(numbers: set[int]) -> list[tuple[int, int]]:
    """The runs of consecutive numbers as (first, last), highest first."""
    firsts = sorted(n for n in numbers if n - 1 not in numbers)
    lasts = sorted(n for n in numbers if n + 1 not in numbers)
    return list(zip(firsts, lasts, strict=True))[::-1]

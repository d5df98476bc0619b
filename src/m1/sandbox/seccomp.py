"""A seccomp filter in classic BPF that refuses the system calls through which kernels are attacked.

Programs never need them: mounting, namespaces, tracing, kernel modules, keys, bpf, io_uring. Inside
the sandbox they fail with EPERM; calls of a foreign ABI (32-bit, x32) kill the process, because
numbers mean other things there. Sockets are of the four families that programs need: namespaces do
not hold vsock, by which a virtual machine talks to its host.
"""

import errno
import platform
import struct

_NUMBERS = {
    "x86_64": {
        "ptrace": 101, "acct": 163, "mount": 165, "umount2": 166, "swapon": 167, "swapoff": 168,
        "reboot": 169, "iopl": 172, "ioperm": 173, "init_module": 175, "delete_module": 176,
        "quotactl": 179, "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250,
        "unshare": 272, "perf_event_open": 298, "open_by_handle_at": 304, "setns": 308,
        "process_vm_readv": 310, "process_vm_writev": 311, "finit_module": 313,
        "kexec_file_load": 320, "bpf": 321, "userfaultfd": 323, "io_uring_setup": 425,
        "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
        "fsopen": 430, "fsconfig": 431, "fsmount": 432, "mount_setattr": 442, "pivot_root": 155,
        "chroot": 161,
    },
    "aarch64": {
        "ptrace": 117, "acct": 89, "mount": 40, "umount2": 39, "swapon": 224, "swapoff": 225,
        "reboot": 142, "init_module": 105, "delete_module": 106, "quotactl": 60,
        "kexec_load": 104, "add_key": 217, "request_key": 218, "keyctl": 219, "unshare": 97,
        "perf_event_open": 241, "open_by_handle_at": 265, "setns": 268, "process_vm_readv": 270,
        "process_vm_writev": 271, "finit_module": 273, "kexec_file_load": 294, "bpf": 280,
        "userfaultfd": 282, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427,
        "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432,
        "mount_setattr": 442, "pivot_root": 41, "chroot": 51,
    },
}  # fmt: skip
_SOCKET = {"x86_64": 41, "aarch64": 198}
_FAMILIES = (1, 2, 10, 16)
"""AF_UNIX, AF_INET, AF_INET6, AF_NETLINK."""
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000

_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def denied_calls(machine: str | None = None) -> dict[str, int]:
    """Names and numbers of the refused calls; empty for a machine without a table."""
    return dict(_NUMBERS.get(machine or platform.machine(), {}))


def program(machine: str | None = None) -> bytes | None:
    """The filter as `struct sock_filter[]`, what bubblewrap's --seccomp reads; None without one."""
    machine = machine or platform.machine()
    if machine not in _NUMBERS:
        return None
    numbers = sorted(_NUMBERS[machine].values())
    code = [
        (_LOAD, 0, 0, 4),  # seccomp_data.arch
        (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # seccomp_data.nr
        (_JUMP_GREATER_EQUAL, 0, 1, _X32_BIT),
        (_RETURN, 0, 0, _KILL),
    ]
    tail = [
        (_JUMP_EQUAL, 1, 0, _SOCKET[machine]),
        (_RETURN, 0, 0, _ALLOW),
        (_LOAD, 0, 0, 16),  # the low half of the first argument
        *((_JUMP_EQUAL, len(_FAMILIES) - i, 0, family) for i, family in enumerate(_FAMILIES)),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    for position, number in enumerate(numbers):
        code.append((_JUMP_EQUAL, len(numbers) - position + len(tail) - 3, 0, number))
    code += tail
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)

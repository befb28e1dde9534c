"""How the sandbox's processes are shut in: namespaces with a file system of their own, a system call filter, limits.

Runs in a bare interpreter without site-packages, so it imports the standard library only. Linux; the call filter knows
x86_64. Each function says by its result or an OSError whether the machine let it.
"""

import ctypes
import os
import platform
import resource
import socket
import struct
import sys

_LIBC = ctypes.CDLL(None, use_errno=True)
NOBODY = 65534
_NEW_NS, _NEW_UTS, _NEW_IPC, _NEW_USER, _NEW_PID, _NEW_NET = (1 << bit for bit in (17, 26, 27, 28, 29, 30))
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_MS_RELATIME, _ST_RELATIME = 1 << 21, 4096
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
_CAPSET, _NUM_CAPS = {"x86_64": 126, "aarch64": 91}, 64


def check(result: int, what: str) -> None:
    """A libc call's result as an exception."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def enter_namespaces(folder_bytes: int) -> None:
    """Leave the machine's network, files, processes and IPC; children are alone in a new process tree.

    The files that stay are the standard library and shared libraries, read-only, and an empty folder /tmp in memory.

    Raises:
        OSError: the kernel or a container's policy does not let us.
    """
    uid, gid = os.geteuid(), os.getegid()
    os.umask(0o022)
    flags = _NEW_NS | _NEW_UTS | _NEW_IPC | _NEW_PID | _NEW_NET
    check(_LIBC.unshare(flags if uid == 0 else flags | _NEW_USER), "unshare")
    if uid != 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    sources = [os.path.realpath(path) for path in _needed()]
    opened = {path: os.open(path, os.O_PATH) for path in dict.fromkeys(sources)}  # the new root may hide them
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={folder_bytes},nr_inodes=4096,mode=755")
    for path, fd in opened.items():
        os.makedirs(f"/tmp{path}", exist_ok=True)
        _mount(f"/proc/self/fd/{fd}", f"/tmp{path}", None, _MS_BIND)
        # a mount's own restrictions cannot be lifted here, so they are asked for again
        found = os.statvfs(path).f_flag
        kept = found & (2 | 4 | 8 | 1024 | 2048) | (_MS_RELATIME if found & _ST_RELATIME else 0)
        _mount("none", f"/tmp{path}", None, _MS_BIND | _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | kept)
        os.close(fd)
    for link in ("/lib", "/lib64"):
        if os.path.islink(link):
            os.symlink(os.readlink(link), f"/tmp{link}")
    os.makedirs("/tmp/tmp")
    os.chmod("/tmp/tmp", 0o1777)
    os.chroot("/tmp")
    os.chdir("/tmp")


def _needed() -> list[str]:
    """What a Python program reads: the standard library, and the shared libraries its modules load."""
    libraries = os.path.join(sys.base_prefix, "lib")
    return [
        path for path in (os.path.dirname(os.__file__), "/lib", "/lib64", "/usr/lib", libraries) if os.path.isdir(path)
    ]


def _mount(source: str, target: str, kind: "str | None", flags: int, data: "str | None" = None) -> None:
    given = [None if text is None else text.encode() for text in (source, target, kind)]
    check(_LIBC.mount(*given, ctypes.c_ulong(flags), None if data is None else data.encode()), f"mount {target}")


def drop_privileges() -> None:
    """Become a user who owns nothing, if we are root, and give up every capability; there is no way back.

    Root stays root, but without its powers, where nobody else could read the standard library.
    """
    _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for capability in range(_NUM_CAPS):
        _LIBC.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    if os.geteuid() == 0 and _open_to_all(os.__file__):
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    if platform.machine() in _CAPSET:
        header = struct.pack("=Ii", 0x20080522, 0)
        _LIBC.syscall(_CAPSET[platform.machine()], header, bytes(24))
    _LIBC.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # nobody reads our memory through /proc


def _open_to_all(path: str) -> bool:
    """Whether every user may read a file."""
    parts = path.split("/")
    above = ["/".join(parts[:end]) or "/" for end in range(1, len(parts))]
    return bool(os.stat(path).st_mode & 0o4) and all(os.stat(folder).st_mode & 0o1 for folder in above)


def die_with_parent() -> None:
    """Be killed when the parent ends. After every change of user, which would undo it."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0)


def set_limits(*, cpu_seconds: int, memory_bytes: int, file_bytes: int, open_files: int) -> None:
    """Limit processor time, address space, the size of a file, open files, processes and core dumps."""
    limits = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: open_files,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 1024,  # of the whole user; where calls are filtered there is no fork anyway
    }
    for which, limit in limits.items():
        hard = resource.getrlimit(which)[1]
        least = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(which, (least, least))


# Refused with EPERM. Numbers are those of x86_64, by what the calls could do.
_NETWORK = {"socket": 41, "connect": 42, "accept": 43, "sendto": 44, "sendmsg": 46, "bind": 49, "listen": 50,
            "socketpair": 53, "accept4": 288, "sendmmsg": 307}  # fmt: skip
_OTHER_PROCESSES = {"ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "pidfd_open": 434,
                    "pidfd_send_signal": 424, "pidfd_getfd": 438, "process_madvise": 440, "tkill": 200,
                    "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "setpriority": 141, "ioprio_set": 251,
                    "sched_setparam": 142, "sched_setscheduler": 144, "sched_setaffinity": 203, "sched_setattr": 314,
                    "setsid": 112, "setpgid": 109, "prctl": 157}  # fmt: skip
_NEW_PROCESSES = {"fork": 57, "vfork": 58, "execve": 59, "execveat": 322}
_KERNEL = {"unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "bpf": 321,
           "perf_event_open": 298, "userfaultfd": 323, "io_uring_setup": 425, "io_uring_enter": 426,
           "io_uring_register": 427, "add_key": 248, "request_key": 249, "keyctl": 250, "personality": 135,
           "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsmount": 432, "mount_setattr": 442,
           "shmget": 29, "msgget": 68, "semget": 64, "mq_open": 240, "name_to_handle_at": 303,
           "open_by_handle_at": 304}  # fmt: skip
_WRITES = {"creat": 85, "mkdir": 83, "mkdirat": 258, "rename": 82, "renameat": 264, "renameat2": 316, "unlink": 87,
           "unlinkat": 263, "rmdir": 84, "link": 86, "linkat": 265, "symlink": 88, "symlinkat": 266, "truncate": 76,
           "chmod": 90, "fchmod": 91, "fchmodat": 268, "fchmodat2": 452, "chown": 92, "fchown": 93, "lchown": 94,
           "fchownat": 260, "mknod": 133, "mknodat": 259, "utime": 132, "utimes": 235, "futimesat": 261,
           "utimensat": 280, "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190}  # fmt: skip
_KILL, _TGKILL, _OPEN, _OPENAT, _OPENAT2, _CLONE, _CLONE3, _PRLIMIT = 62, 234, 2, 257, 437, 56, 435, 302
_CLONE_THREAD = 0x10000
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_X86_64 = 0xC000003E  # AUDIT_ARCH_X86_64
_ALLOW, _EPERM, _ENOSYS = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38
_LOAD, _EQUAL, _BITS, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06  # BPF: ld abs, jeq, jset, jge, ret


def filter_calls(*, may_write: bool, may_kill: bool = False) -> None:
    """Refuse this process, for good, every system call that reaches beyond it. Threads may be made, processes not.

    Raises:
        OSError: the machine is no x86_64, or the kernel has no filters.
    """
    if platform.machine() != "x86_64":
        raise OSError("the system call filter knows x86_64 only")
    number, low_of = 0, [16 + 8 * index for index in range(6)]
    refused = {**_NETWORK, **_OTHER_PROCESSES, **_NEW_PROCESSES, **_KERNEL, **({} if may_write else _WRITES)}
    own = os.getpid()
    program = [
        *((_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _X86_64), (_RETURN, 0, 0, _EPERM), (_LOAD, 0, 0, number)),
        *((_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _ENOSYS)),  # the x32 numbers of the same calls
        *(step for call in refused.values() for step in ((_EQUAL, 0, 1, call), (_RETURN, 0, 0, _EPERM))),
        *(step for call in (_CLONE3, _OPENAT2) for step in ((_EQUAL, 0, 1, call), (_RETURN, 0, 0, _ENOSYS))),
        *_unless(_CLONE, low_of[0], _BITS, _CLONE_THREAD),
        *_unless(_TGKILL, low_of[0], _EQUAL, own),
        *([] if may_kill else _unless(_KILL, low_of[0], _EQUAL, own)),
        *_unless(_PRLIMIT, low_of[0], _EQUAL, 0),
        *([] if may_write else [*_if(_OPEN, low_of[1], _WRITING), *_if(_OPENAT, low_of[2], _WRITING)]),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = b"".join(struct.pack("=HBBI", *step) for step in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    fprog = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    check(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    check(_LIBC.prctl(_PR_SET_SECCOMP, 2, fprog, 0, 0), "seccomp")


def _unless(call: int, place: int, test: int, value: int) -> "list[tuple[int, int, int, int]]":
    """Refuse a call unless an argument equals a value or has a bit."""
    return [(_EQUAL, 0, 4, call), (_LOAD, 0, 0, place), (test, 1, 0, value), (_RETURN, 0, 0, _EPERM), (_LOAD, 0, 0, 0)]


def _if(call: int, place: int, bits: int) -> "list[tuple[int, int, int, int]]":
    """Refuse a call if an argument has one of the bits."""
    return [(_EQUAL, 0, 4, call), (_LOAD, 0, 0, place), (_BITS, 0, 1, bits), (_RETURN, 0, 0, _EPERM), (_LOAD, 0, 0, 0)]


def close_all_but(*kept: int) -> None:
    """Close every file but these."""
    edges = [2, *sorted(kept), resource.getrlimit(resource.RLIMIT_NOFILE)[0]]
    for before, after in zip(edges, edges[1:], strict=False):
        os.closerange(before + 1, min(after, 1 << 16))


def probe() -> "dict[str, bool]":
    """What a confined program can in truth do: each is tried. Raises where it cannot even import a module."""
    import decimal  # noqa: F401

    return {
        "network": _works(
            lambda: socket.create_connection(("127.0.0.1", 9), timeout=1), refused=ConnectionRefusedError
        ),
        "files": _works(lambda: os.listdir("/etc")),
        "writes": any(_works(lambda path=path: os.close(os.open(path, os.O_WRONLY))) for path in _PRECIOUS)
        or _works(lambda: os.mkdir("/var/tmp/grpo-lab-probe")),
        "processes": _works(lambda: os.kill(os.getppid() or 1, 0)) and os.getppid() != 0,
        "fork": _works(_fork),
    }


_PRECIOUS = ("/etc/passwd", os.__file__)


def _works(action: object, refused: "type[BaseException]" = KeyboardInterrupt) -> bool:
    """`refused` is an answer from the other side, so it was reached."""
    try:
        action()  # type: ignore[operator]
    except refused:
        return True
    except OSError:
        return False
    return True


def _fork() -> None:
    if (pid := os.fork()) == 0:
        os._exit(0)
    os.waitpid(pid, 0)

//! Isolation: a command can see and reach only its own build.

use std::{fs, os::unix::fs::PermissionsExt};

use cofferdam_tests::{Cofferdam, Outcome, guest};
use nix::sys::signal::Signal;

/// Runs a script, and returns its output.
fn printed_by(script: &str) -> String {
    let cofferdam = Cofferdam::new();
    let build = cofferdam.build().output("build/facts").exported();
    let built: Outcome = build.shell(&format!("exec > facts 2>&1\n{script}\ntrue")).succeeds();
    built.read("build/facts")
}

#[test]
fn the_command_is_unprivileged_and_isolated() {
    let facts = printed_by(
        "pwd; id -u; id -g; id -G; hostname; umask
         wc -c < /dev/stdin
         grep -E '^(Cap(Inh|Prm|Eff|Bnd|Amb)|NoNewPrivs|Groups)' /proc/self/status | tr -d '\\t '
         grep '^root:' /etc/passwd | cut -d: -f3,4
         grep ':1000:100:' /etc/passwd | cut -d: -f3,4
         grep -w localhost /etc/hosts | cut -d' ' -f1
         hostname changed 2>/dev/null || echo the host name stays
         mknod /build/device c 1 3 2>/dev/null || echo no device can be made
         mount -t tmpfs x /build 2>/dev/null || echo nothing can be mounted
         chown 0:0 /build 2>/dev/null || echo nothing can be given away
         kill -9 1 2>/dev/null; echo still here",
    );
    let expected = [
        "/build",
        "1000",
        "100",
        "100",
        "localhost",
        "0022",
        "0",
        "Groups:",
        "CapInh:0000000000000000",
        "CapPrm:0000000000000000",
        "CapEff:0000000000000000",
        "CapBnd:0000000000000000",
        "CapAmb:0000000000000000",
        "NoNewPrivs:1",
        "0:0",
        "1000:100",
        "127.0.0.1",
        "::1",
        "the host name stays",
        "no device can be made",
        "nothing can be mounted",
        "nothing can be given away",
        "still here",
    ];
    assert_eq!(facts.lines().collect::<Vec<_>>(), expected, "{facts}");
}

#[test]
fn there_is_no_network_but_loopback() {
    let facts = printed_by(
        "sed 1,2d /proc/net/dev | cut -d: -f1 | tr -d ' '
         ip address show dev lo | grep -o -E ',UP|inet 127.0.0.1/8'
         ip route | wc -l
         cat /etc/resolv.conf 2>/dev/null
         echo hello | nc -l -p 4711 > /dev/null &
         until nc 127.0.0.1 4711 < /dev/null 2>/dev/null; do sleep 0.1; done
         nc -w 2 192.0.2.1 80 < /dev/null 2>/dev/null || echo nobody is out there",
    );
    assert_eq!(facts, "lo\n,UP\ninet 127.0.0.1/8\n0\nhello\nnobody is out there\n");
}

#[test]
fn there_is_no_vsock() {
    let cofferdam = Cofferdam::new();
    cofferdam.build().input("probe", guest::probe()).run(["/inputs/probe", "vsock"]).succeeds();
}

#[test]
fn only_its_own_processes_are_visible() {
    let facts = printed_by(
        "for process in /proc/[0-9]*; do
             read -r name < $process/comm
             case $name in
                 sh | guest-init | init) ;;
                 *) echo unknown: $name ;;
             esac
         done
         set -- /proc/[0-9]*; test $# -le 3 || echo many: $*
         test $$ -lt 20 || echo my number is $$
         ls /proc/1/root/ >/dev/null 2>&1 && test \"$(ls /proc/1/root)\" != \"$(ls /)\" && ls /proc/1/root
         cat /proc/1/environ 2>/dev/null
         cat /proc/kcore 2>/dev/null | head -c 1
         echo b > /proc/sysrq-trigger && echo it can reset the machine
         echo 0 > /proc/sys/vm/overcommit_memory && echo it can change the kernel
         exit 0",
    );
    let worrying: Vec<_> = facts.lines().filter(|line| !line.contains("can't create /proc/s")).collect();
    assert!(worrying.is_empty(), "{facts}");
}

#[test]
fn dev_has_only_the_usual_devices() {
    let facts = printed_by(
        "echo $(ls /dev)
         echo thrown away > /dev/null
         head -c 3 /dev/zero | od -An -tx1
         echo x > /dev/full || echo full is full
         head -c 16 /dev/urandom | wc -c
         head -c 16 /dev/random | wc -c
         echo shared > /dev/shm/file && cat /dev/shm/file
         echo by number | cat /dev/fd/0
         touch /dev/new 2>/dev/null || echo nothing can be added",
    );
    let (names, rest) = facts.split_once('\n').unwrap();
    let expected = "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero";
    assert_eq!(names, expected);
    let lines: Vec<_> = rest.lines().map(str::trim).filter(|line| !line.contains("write error")).collect();
    let expected = ["00 00 00", "full is full", "16", "16", "shared", "by number", "nothing can be added"];
    assert_eq!(lines, expected, "{facts}");
}

#[test]
fn tmp_is_writable_and_the_root_is_not() {
    let facts = printed_by(
        "stat -c %a /tmp
         echo x > /tmp/file && cat /tmp/file
         touch /new 2>/dev/null && echo / can be written
         for place in /bin /etc /dev /proc /inputs; do
             touch $place/new 2>/dev/null && echo $place can be written
             rm -rf $place/* 2>/dev/null
         done
         ls -d /bin /build /dev /etc /inputs /proc /tmp
         test -s /etc/passwd && test -s /etc/group && test -x /bin/sh && echo all is still there",
    );
    assert_eq!(
        facts, "1777\nx\n/bin\n/build\n/dev\n/etc\n/inputs\n/proc\n/tmp\nall is still there\n",
        "the build could change what is not its own"
    );
}

/// A guest that dials a port reaches the socket named `s_PORT` in that directory, so there must be only one.
#[test]
fn a_guest_reaches_one_socket_of_the_host() {
    let cofferdam = Cofferdam::new();
    let running = cofferdam.build().start_shell("echo in the middle; sleep 1000");
    running.wait_for("in the middle");
    let mut runs = fs::read_dir(cofferdam.run_directory()).unwrap().map(|entry| entry.unwrap().path());
    let directory = runs.find(|path| path.is_dir()).unwrap().join("vsock");
    assert_eq!(fs::metadata(&directory).unwrap().permissions().mode() & 0o7777, 0o777);
    let mut names: Vec<_> = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["s", "s_17222"]);
    running.signal(Signal::SIGTERM);
    running.end().executor_fails("interrupted");
}

#[test]
fn sys_is_shown_and_read_only() {
    let facts = printed_by(
        "cat /sys/devices/system/cpu/online; ls /sys/class/net
         for file in /sys/kernel/mm/transparent_hugepage/enabled /sys/class/net/lo/mtu /sys/new; do
             echo 1 2>/dev/null > $file && echo wrote $file
         done",
    );
    assert_eq!(facts.lines().collect::<Vec<_>>(), ["0-1", "lo"], "{facts}");
}

#[test]
fn user_namespaces_are_off_unless_allowed() {
    let cofferdam = Cofferdam::new();
    let script = "unshare -Ur id -u && unshare -Urm mount -t tmpfs x /tmp && echo made";
    let refused = cofferdam.build().shell(script).build_fails("exit_code");
    assert!(refused.stderr.contains("No space left on device"), "{refused}");
    let allowed = cofferdam.build().switch("--user-namespaces").shell(script).succeeds();
    assert!(allowed.stderr.ends_with("0\nmade\n"), "{allowed}");
}

/// An i386 program that prints a line.
fn i386_program() -> Vec<u8> {
    const BASE: u32 = 0x0804_8000;
    const CODE_AT: u32 = 52 + 32;
    let code = [
        &[0xb8, 4, 0, 0, 0, 0xbb, 1, 0, 0, 0, 0xb9][..],
        &(BASE + CODE_AT + 34).to_le_bytes(),
        &[0xba, 5, 0, 0, 0, 0xcd, 0x80],
        &[0xb8, 1, 0, 0, 0, 0xbb, 0, 0, 0, 0, 0xcd, 0x80],
        b"i386\n",
    ]
    .concat();
    let size = CODE_AT + u32::try_from(code.len()).expect("a short program");
    let half = |number: u16| number.to_le_bytes().to_vec();
    let word = |number: u32| number.to_le_bytes().to_vec();
    [
        b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec(),
        // Executable, i386, version 1, entry point, program headers, no sections.
        [half(2), half(3), word(1), word(BASE + CODE_AT), word(52), word(0), word(0)].concat(),
        [half(52), half(32), half(1), half(0), half(0), half(0)].concat(),
        // Loaded from the file's beginning, readable and executable.
        [word(1), word(0), word(BASE), word(BASE), word(size), word(size), word(5), word(4096)].concat(),
        code,
    ]
    .concat()
}

#[test]
fn i386_programs_run() {
    let cofferdam = Cofferdam::new();
    let program = cofferdam.file("program", i386_program());
    fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    let built = cofferdam.build().input("program", &program).run(["/inputs/program"]).succeeds();
    assert!(built.stderr.ends_with("i386\n"), "{built}");
}

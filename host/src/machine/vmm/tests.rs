//! How machines begin and end, with small programs in the place of the VMM and of its device.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, PipeWriter, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::Handle;

use crate::machine::jail::{Program, Spawner};
use crate::machine::{Attachment, AttachmentKind, Cause};

use super::cloud_hypervisor::CloudHypervisor;
use super::qemu::Qemu;
use super::*;

/// Writes an executable file. From another process, because a descriptor that is open for writing here may be in the
/// hands of a child that another thread has just forked, and then the kernel refuses to execute the file.
pub(super) fn program(path: &Path, script: &str) -> PathBuf {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "printf '#!/bin/sh\\n%s\\n' \"$2\" > \"$1\" && chmod 755 \"$1\"", "sh"]).arg(path).arg(script);
    assert!(command.status().unwrap().success());
    path.to_owned()
}

fn share(tag: &'static str, socket: &'static str, queue_size: u32) -> Attachment {
    Attachment { kind: AttachmentKind::Fs { tag }, socket, queue_size }
}

/// A run directory whose path is longer than a socket's address may be.
struct RunDir {
    root: tempfile::TempDir,
    path: PathBuf,
}

impl RunDir {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("long".repeat(40));
        fs::create_dir(&path).unwrap();
        Self { root, path }
    }

    fn listen(&self, name: &str) -> UnixListener {
        let directory = File::open(&self.path).unwrap();
        UnixListener::bind(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd())).unwrap()
    }

    fn program(&self, name: &str, script: &str) -> PathBuf {
        program(&self.root.path().join(name), script)
    }

    async fn start(&self, vmm: &dyn Vmm) -> Result<Vm, VmmError> {
        let spawner = Spawner::without_walls(Handle::current()).unwrap();
        vmm.start(&spawner, &self.path, &self.config()).await
    }

    fn config(&self) -> Config {
        let file = self.program("file", "");
        Config {
            kernel: file.clone(),
            initramfs: file,
            memory_bytes: 1 << 30,
            cpus: 3,
            cpu_model: None,
            hugepages: false,
            attachments: vec![share("inputs", "fs.sock", 512), share("paths", "paths.sock", 64)],
            nested: false,
        }
    }

    /// Processes that work in this directory, other than zombies.
    fn processes(&self) -> usize {
        let processes = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path().join("cwd"));
        processes.filter(|cwd| fs::read_link(cwd).is_ok_and(|directory| directory == self.path)).count()
    }
}

/// A script of a process that listens on the vsock device's socket, and then goes on in Perl.
fn listening(then: &str) -> String {
    format!(
        "exec perl -MSocket -e 'socket(my $l, PF_UNIX, SOCK_STREAM, 0); unlink \"vsock.sock\"; \
         bind($l, pack_sockaddr_un(\"vsock.sock\")) && listen($l, 9) || die; $| = 1; {then}'"
    )
}

fn qemu(program: PathBuf, vsock_device: PathBuf) -> Qemu {
    Qemu { program, vsock_device, accelerator: Accelerator::Tcg }
}

#[tokio::test]
async fn qemu_gets_its_machine_and_its_end_is_the_machines() {
    let run = RunDir::new();
    let vmm = qemu(
        run.program("qemu", "until [ -s seen ]; do sleep 0.01; done; echo \"$@\"; readlink /proc/self/fd/3; exit 5"),
        run.program("device", &format!("echo \"$@\" > seen; {}", listening("sleep"))),
    );
    let mut vm = run.start(&vmm).await.unwrap();
    let death = vm.died().await;
    assert_eq!((death.program.as_str(), death.status.code()), ("qemu", Some(5)));
    for part in [
        "memory-backend-memfd,id=memory,size=1024M,share=on",
        "-smp 3,sockets=1,cores=3,threads=1",
        "-cpu max,-erms,-fsrm ",
        "-chardev socket,id=inputs,path=fs.sock -device vhost-user-fs-pci,chardev=inputs,tag=inputs,queue-size=512",
        "-chardev socket,id=paths,path=paths.sock -device vhost-user-fs-pci,chardev=paths,tag=paths,queue-size=64",
        "\nsocket:[",
    ] {
        assert!(death.said.contains(part), "{part} is not in: {}", death.said);
    }
    assert!(death.to_string().starts_with("qemu died (exit status: 5); its last output: -M microvm"));
    assert_eq!(vm.console(), death.said);
    assert_eq!(
        fs::read_to_string(run.path.join("seen")).unwrap(),
        "--vm guest-cid=3,socket=vsock.sock,uds-path=vsock/s\n"
    );
    assert_eq!(run.processes(), 1);
    vm.kill().await;
    assert_eq!(run.processes(), 0);
    assert_eq!(vm.died().await.status.code(), Some(5));
}

#[tokio::test]
async fn the_end_of_the_device_is_the_machines_too() {
    let run = RunDir::new();
    let device = listening("select(undef, undef, undef, 0.01) until -e \"go\"; print \"gone\"; exit 4");
    let vmm = qemu(run.program("qemu", "exec sleep 1000"), run.program("device", &device));
    let mut vm = run.start(&vmm).await.unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(50), vm.died()).await.is_err());
    fs::write(run.path.join("go"), "").unwrap();
    assert_eq!(vm.died().await.to_string(), "vhost-device-vsock died (exit status: 4); its last output: gone");
    vm.kill().await;
    assert_eq!(run.processes(), 0);
}

#[tokio::test]
async fn a_half_started_qemu_leaves_nothing() {
    let run = RunDir::new();
    let device = run.program("device", "echo 'bad option' >&2; exit 3");
    let error = run.start(&qemu("/bin/true".into(), device)).await.unwrap_err();
    let said =
        "the machine ended while it was started: vhost-device-vsock died (exit status: 3); its last output: bad option";
    assert_eq!(error.to_string(), said);

    let error = run.start(&qemu("/bin/true".into(), "/does/not/exist".into())).await.unwrap_err();
    assert_eq!(error.to_string(), "cannot start vhost-device-vsock (/does/not/exist)");

    let device = run.program("device", &listening("sleep"));
    let error = run.start(&qemu("/does/not/exist".into(), device)).await.unwrap_err();
    assert_eq!(error.to_string(), "cannot start qemu (/does/not/exist)");
    assert_eq!(run.processes(), 0);
}

/// The process that listens there passes on everything that the guest says to the host.
#[tokio::test]
async fn qemu_is_connected_to_the_device_that_was_started_for_it_and_to_nobody_else() {
    let run = RunDir::new();
    let stranger = run.listen("vsock.sock");
    let vmm = qemu(
        run.program("qemu", "exec sleep 1000"),
        run.program(
            "device",
            &format!("until [ -e go ]; do sleep 0.01; done; {}", listening("accept(my $c, $l); sleep")),
        ),
    );
    let go = run.path.join("go");
    let (mut vm, strangers) = tokio::join!(
        async { run.start(&vmm).await.unwrap() },
        tokio::task::spawn_blocking(move || {
            let mut said = Vec::new();
            for stream in stranger.incoming().take(3) {
                stream.unwrap().read_to_end(&mut said).unwrap();
            }
            fs::write(go, "").unwrap();
            said
        })
    );
    assert_eq!(strangers.unwrap(), b"", "it is told something");
    assert_eq!(run.processes(), 2);
    vm.kill().await;
}

#[tokio::test]
async fn qemu_shows_the_cpu_that_was_asked_for() {
    let run = RunDir::new();
    let spawner = Spawner::without_walls(Handle::current()).unwrap();
    for (accelerator, nested, cpu) in [
        (Accelerator::Tcg, false, "-cpu Nehalem,enforce "),
        (Accelerator::Kvm, false, "enforce,-vmx,-svm "),
        (Accelerator::Kvm, true, "-cpu Nehalem,enforce "),
    ] {
        let device = run.program("device", &listening("sleep"));
        let vmm = Qemu { accelerator, ..qemu(run.program("qemu", "echo \"$@\""), device) };
        let config = Config { cpu_model: Some("Nehalem".into()), nested, ..run.config() };
        let mut vm = vmm.start(&spawner, &run.path, &config).await.unwrap();
        let said = vm.died().await.said;
        assert!(said.contains(cpu), "{cpu} is not in: {said}");
        vm.kill().await;
    }
}

/// The problem of an unusable cloud-hypervisor, without its file and the advice.
fn unusable(error: &VmmError, program: &Path) -> String {
    let message = error.to_string();
    let (begin, end) = (
        format!("{} can't run a machine", program.display()),
        "; to fix it: name another file in COFFERDAM_CLOUD_HYPERVISOR, or use --vmm qemu",
    );
    let said = message.strip_prefix(&begin).and_then(|rest| rest.strip_suffix(end)).unwrap();
    format!("{}{said}", std::error::Error::source(error).unwrap())
}

#[tokio::test]
async fn a_cloud_hypervisor_that_does_not_start_says_why() {
    let run = RunDir::new();
    for (script, problem) in [
        (
            "echo \"$@\"; echo 'no such option' >&2; exit 1",
            "the machine ended while it was started: cloud-hypervisor died (exit status: 1); its last output: \
             --api-socket fd=3 --event-monitor fd=4 --seccomp true\nno such option",
        ),
        (
            "kill -SYS $$",
            "the machine ended while it was started: cloud-hypervisor died (signal: 31 (SIGSYS)) without output",
        ),
        (
            "echo 'not today'; exec sleep 1000",
            "cloud-hypervisor did not answer vmm.ping within 0.5 s; its last output: not today",
        ),
    ] {
        let program = run.program("ch", script);
        let vmm = CloudHypervisor { ready: Duration::from_millis(500), program: program.clone() };
        let error = run.start(&vmm).await.unwrap_err();
        assert_eq!(unusable(&error, &program), problem);
        assert_eq!(fs::read_dir(&run.path).unwrap().count(), 0);
        assert_eq!(run.processes(), 0);
    }
    let killed = CloudHypervisor::new(run.program("ch", "kill -KILL $$"));
    assert_eq!(
        run.start(&killed).await.unwrap_err().to_string(),
        "the machine ended while it was started: cloud-hypervisor died (signal: 9 (SIGKILL)) without output"
    );
    let program = run.root.path().join("not executable");
    fs::write(&program, "").unwrap();
    let error = run.start(&CloudHypervisor::new(program.clone())).await.unwrap_err();
    assert_eq!(unusable(&error, &program), format!("cannot start cloud-hypervisor ({})", program.display()));
}

/// A fake cloud-hypervisor: the test plays its API and its events, and a script is its process.
struct Played {
    run: RunDir,
    calls: Arc<Mutex<Vec<String>>>,
    events: PipeWriter,
}

/// What the API answers to a call of some path: status and body. Nothing is no answer at all.
type Answers = fn(&str) -> Option<(u16, &'static str)>;

fn works(call: &str) -> Option<(u16, &'static str)> {
    Some(match call {
        "vmm.ping" => (200, r#"{"build_version":"v53.0","version":"53.0.0","pid":1,"features":["kvm"]}"#),
        "vm.info" => (200, r#"{"config":{},"state":"Running","memory_actual_size":1073741824,"device_tree":{}}"#),
        "vm.counters" => (200, r#"{"_disk0":{"read_bytes":5}}"#),
        _ => (204, ""),
    })
}

impl Played {
    async fn start(script: &str, answers: Answers) -> (Self, Result<Vm, VmmError>) {
        let run = RunDir::new();
        let spawner = Spawner::without_walls(Handle::current()).unwrap();
        let program = run.program("ch", script);
        let process = spawner.spawn(Program::new("cloud-hypervisor", &program, &run.path)).await.unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (reader, events) = std::io::pipe().unwrap();
        let calls = Arc::default();
        thread::spawn({
            let (calls, ended) = (Arc::clone(&calls), run.path.join("ended"));
            move || serve(&theirs, answers, &calls, &ended)
        });
        let vmm = CloudHypervisor { ready: Duration::from_millis(500), program };
        let outcome = vmm.drive(process, ours, reader.into(), &run.config()).await;
        (Self { run, calls, events }, outcome)
    }

    fn calls(&self) -> Vec<String> {
        self.calls.lock().clone()
    }

    fn tell(&mut self, source: &str, event: &str) {
        let event = format!("{{\n  \"source\": \"{source}\",\n  \"event\": \"{event}\"\n}}\n\n");
        self.events.write_all(event.as_bytes()).unwrap();
    }
}

/// Answers requests until there are no more; `vmm.shutdown` makes the file `ended`.
fn serve(stream: &UnixStream, answers: Answers, calls: &Mutex<Vec<String>>, ended: &Path) {
    let mut lines = BufReader::new(stream);
    let mut line = String::new();
    while lines.read_line(&mut line).is_ok_and(|length| length > 0) {
        let call = line.trim_end().trim_end_matches(" HTTP/1.1").replace("/api/v1/", "");
        let mut length = 0;
        while line != "\r\n" {
            line.clear();
            lines.read_line(&mut line).unwrap();
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
        }
        line.clear();
        let mut body = vec![0; length];
        lines.read_exact(&mut body).unwrap();
        calls.lock().push(call.clone());
        if call.ends_with("vmm.shutdown") {
            fs::write(ended, "").unwrap();
        }
        if let Some((status, body)) = answers(call.split(' ').next_back().unwrap()) {
            let head = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n\r\n", body.len());
            // The client may have gone.
            let _ = (&*stream).write_all((head + body).as_bytes());
        }
    }
}

const UNTIL_SHUT_DOWN: &str = "until [ -e ended ]; do sleep 0.01; done";

#[tokio::test]
async fn a_machines_whole_life_goes_through_the_api() {
    let (played, outcome) = Played::start(UNTIL_SHUT_DOWN, works).await;
    let mut vm = outcome.unwrap();
    let booted = ["GET vmm.ping", "PUT vm.create", "PUT vm.boot"];
    assert_eq!(played.calls(), booted);
    vm.end_in_order().await;
    let ended = ["GET vm.info", "GET vm.counters", "PUT vm.shutdown", "PUT vm.delete", "PUT vmm.shutdown"];
    assert_eq!(played.calls()[3..], ended);
    let death = vm.died().await;
    assert!(death.status.success() && death.cause == Cause::Process, "{death}");
    assert_eq!(played.run.processes(), 0);
}

#[tokio::test]
async fn panic_reset_and_death_of_the_vmm_are_distinguished() {
    let speak_then = |end: &str| format!("echo 'Kernel panic - not syncing'; touch spoke; {end}");
    for (source, event, cause, message) in [
        ("guest", "panic", Cause::Panic, "the guest's kernel panicked; its last output: Kernel panic - not syncing"),
        ("vm", "rebooting", Cause::Reset, "the guest reset itself; its last output: Kernel panic - not syncing"),
    ] {
        let (mut played, outcome) = Played::start(&speak_then("exec sleep 1000"), works).await;
        let mut vm = outcome.unwrap();
        while !played.run.path.join("spoke").exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        played.tell("vm", "booted");
        played.tell("virtio-device", "reset");
        assert!(tokio::time::timeout(Duration::from_millis(50), vm.died()).await.is_err());
        played.tell(source, event);
        let death = vm.died().await;
        assert_eq!((death.cause, death.to_string().as_str()), (cause, message));
        assert_eq!(vm.died().await.cause, cause);
        assert_eq!(played.run.processes(), 0);
    }

    // It reported the panic, and ended before the report was read.
    let (mut played, outcome) = Played::start(UNTIL_SHUT_DOWN, works).await;
    played.tell("guest", "panic");
    fs::write(played.run.path.join("ended"), "").unwrap();
    assert_eq!(outcome.unwrap().died().await.cause, Cause::Panic);

    let (played, outcome) = Played::start(&speak_then("kill -SEGV $$"), works).await;
    drop(played.events);
    let death = outcome.unwrap().died().await;
    assert_eq!(death.cause, Cause::Process);
    assert_eq!(
        death.to_string(),
        "cloud-hypervisor died (signal: 11 (SIGSEGV)); its last output: Kernel panic - not syncing"
    );
}

#[tokio::test]
async fn a_machine_that_does_not_end_in_order_is_killed() {
    let stuck: [Answers; 3] = [
        |call| if call == "vm.info" { None } else { works(call) },
        |call| if call == "vm.shutdown" { None } else { works(call) },
        |call| if call == "vm.delete" { Some((500, r#"["the VM is busy"]"#)) } else { works(call) },
    ];
    for answers in stuck {
        let (played, outcome) = Played::start("exec sleep 1000", answers).await;
        let mut vm = outcome.unwrap();
        vm.end_in_order().await;
        vm.kill().await;
        assert_eq!(played.run.processes(), 0);
    }
}

#[tokio::test]
async fn a_guest_that_powers_off_by_itself_needs_no_order() {
    let (played, outcome) =
        Played::start(UNTIL_SHUT_DOWN, |call| if call == "vm.info" { None } else { works(call) }).await;
    let mut vm = outcome.unwrap();
    fs::write(played.run.path.join("ended"), "").unwrap();
    vm.end_in_order().await;
    assert!(vm.died().await.status.success());
}

#[tokio::test]
async fn a_refusal_by_cloud_hypervisor_is_reported_with_its_text() {
    let cases: [(Answers, &str); 4] = [
        (
            |call| if call == "vmm.ping" { Some((200, r#"{"version":"38.1.0"}"#)) } else { works(call) },
            "it is version 38.1.0; the oldest that works is 39.0, the first that boots a distribution's kernel \
             (bzImage)",
        ),
        (
            |call| if call == "vmm.ping" { Some((200, "<html>")) } else { works(call) },
            "cloud-hypervisor gave no usable answer to vmm.ping",
        ),
        (
            |call| if call == "vmm.ping" { Some((404, "")) } else { works(call) },
            "cloud-hypervisor refused vmm.ping (HTTP status 404): ",
        ),
        (
            |call| if call == "vm.boot" { Some((500, r#"["VM boot failed","no such kernel"]"#)) } else { works(call) },
            "cloud-hypervisor refused vm.boot (HTTP status 500): VM boot failed: no such kernel",
        ),
    ];
    for (answers, problem) in cases {
        let (played, outcome) = Played::start("exec sleep 1000", answers).await;
        let program = played.run.root.path().join("ch");
        assert_eq!(unusable(&outcome.unwrap_err(), &program), problem);
        assert_eq!(played.run.processes(), 0);
    }
}

#[tokio::test]
async fn a_machine_out_of_bounds_starts_nothing() {
    let run = RunDir::new();
    let spawner = Spawner::without_walls(Handle::current()).unwrap();
    let vmms: [Box<dyn Vmm>; 2] =
        [Box::new(qemu("/bin/true".into(), "/bin/true".into())), Box::new(CloudHypervisor::new("/bin/true".into()))];
    for vmm in vmms {
        let config = Config { cpus: 0, ..run.config() };
        let error = vmm.start(&spawner, &run.path, &config).await.unwrap_err();
        assert!(matches!(error, VmmError::Machine { field: "cpus", .. }), "{error}");
    }
    let config = Config { cpu_model: Some("EPYC".into()), ..run.config() };
    let error = CloudHypervisor::new("/bin/true".into()).start(&spawner, &run.path, &config).await.unwrap_err();
    assert!(matches!(error, VmmError::Machine { field: "cpu_model", .. }), "{error}");
}

//! Measurements that need a VM.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use cofferdam::{
    devices::inputs::{self, Device},
    machine::jail::Spawner,
    machine::{
        Device as _,
        vmm::{KERNEL_PARAMETERS, Kind, TCG_CPU, qemu_kernel_command_line},
    },
};
use cofferdam_castore::{PathComponent, directoryservice::DirectoryMemory, import::import_path};
use cofferdam_tests::{guest, image, program, vmm};
use tempfile::TempDir;

use super::{
    measure::{ROUNDS, Series, report},
    tree::{FILE_BYTES, FILES, make_tree},
};

/// The port of the host for a guest's bytes.
const VSOCK_PORT: u32 = 17_222;

/// A trivial build with the requested VMM.
pub(crate) fn trivial_build(directory: &TempDir) -> Result<()> {
    let vmm = match vmm::asked() {
        Some("cloud-hypervisor") => Kind::CloudHypervisor,
        _ => Kind::Qemu,
    };
    let state = directory.path().join("state");
    let bare = directory.path().join("bare");
    guest::image_with_init(&bare, guest::bench());
    let (mut ours, mut peer) = (Series::default(), Series::default());
    for _ in 0..ROUNDS {
        let mut build = Command::new(program());
        build.args(["run", "--vmm", &vmm.to_string(), "--bin-sh", "--output", "build/out"]);
        build.args(["--", "/bin/sh", "-c", "echo > out"]);
        ours.run(build.env("COFFERDAM_STATE_DIR", &state).env("COFFERDAM_IMAGE", image().0))?;
        peer.run(&mut match vmm {
            Kind::Qemu => qemu(&bare, "off", &[]),
            Kind::CloudHypervisor => cloud_hypervisor(&bare),
        })?;
    }
    report("trivial build : bare boot", &ours, &peer, "first figure");
    Ok(())
}

/// A trivial build whose helper processes are walled in, and one on a host that has no namespaces for them.
pub(crate) fn walls(directory: &TempDir) -> Result<()> {
    let build = |command: &mut Command| {
        let state = directory.path().join("state");
        command.args(["run", "--bin-sh", "--output", "build/out", "--", "/bin/sh", "-c", "echo > out"]);
        command.env("COFFERDAM_STATE_DIR", state).env("COFFERDAM_IMAGE", image().0);
    };
    let switch_off = "echo 0 > /proc/sys/user/max_user_namespaces; exec \"$0\" \"$@\"";
    let switch_on = "exec \"$0\" \"$@\"";
    let (mut ours, mut peer) = (Series::default(), Series::default());
    for _ in 0..ROUNDS {
        for (series, script) in [(&mut ours, switch_on), (&mut peer, switch_off)] {
            let mut command = Command::new("unshare");
            command.args(["--user", "--map-root-user", "sh", "-c", script]).arg(program());
            build(&mut command);
            series.run(&mut command)?;
        }
    }
    report("trivial build : without walls", &ours, &peer, "≤ 1.05");
    Ok(())
}

/// Many small inputs, each read once.
pub(crate) fn small_inputs(directory: &TempDir) -> Result<()> {
    let tree = &directory.path().join("shared/tree");
    make_tree(tree)?;
    let runtime = tokio::runtime::Runtime::new()?;
    let image = directory.path().join("read");
    guest::image_with_init(&image, guest::bench());
    let (mut ours, mut peer) = (Series::default(), Series::default());
    for round in 0..ROUNDS {
        let order = if round % 2 == 0 { "inputs,stock" } else { "stock,inputs" };
        for (tag, took) in runtime.block_on(read_in_one_vm(directory, &image, tree, order))? {
            if tag == "inputs" { &mut ours } else { &mut peer }.times.push(took);
        }
    }
    report("read 10,000 inputs : virtiofsd", &ours, &peer, "≤ 0.5");
    Ok(())
}

/// Boots a guest with both devices, which reads each of them. Returns the times by tag.
async fn read_in_one_vm(
    directory: &TempDir,
    image: &Path,
    tree: &Path,
    order: &str,
) -> Result<Vec<(String, Duration)>> {
    let run_dir = tempfile::tempdir_in(directory)?;
    let blobs = format!("file://{}", directory.path().join("store/blobs").display());
    let directories = format!("redb://{}", directory.path().join("store/directories.redb").display());
    let store = cofferdam_castore::Store::from_addrs(&blobs, &directories)?;
    let node = import_path(&store, tree)?;
    let inputs = [(PathComponent::try_from("tree")?, node)].into();
    let resolved = Arc::new(inputs::resolve(&store, &inputs, DirectoryMemory::unlimited()).await?);
    let spawner = Spawner::without_walls(tokio::runtime::Handle::current())?;
    let (mut device, unbound) = Device::start(&spawner, run_dir.path(), &store).await?;
    unbound.bind(resolved);

    let stock_socket = run_dir.path().join("stock.sock");
    let mut stock = Stopped(stock(tree, &stock_socket)?);
    wait_for(&stock_socket, &mut stock)?;
    let ours_socket = run_dir.path().join(device.attachment().socket);
    let devices = [("inputs", ours_socket.as_path()), ("stock", stock_socket.as_path())];
    let output = qemu(image, &format!("read:{order}"), &devices).output()?;
    device.kill().await;
    let console = String::from_utf8_lossy(&output.stdout);
    let times: Vec<_> = console.lines().filter_map(read_time).collect();
    ensure!(times.len() == 2, "the guest did not read both trees:\n{console}");
    Ok(times)
}

/// `read TAG FILES BYTES MICROSECONDS`
fn read_time(line: &str) -> Option<(String, Duration)> {
    let words: Vec<_> = line.split_whitespace().collect();
    match words[..] {
        ["read", tag, files, bytes, took] => {
            let whole = files == FILES.to_string() && bytes == (FILES * FILE_BYTES).to_string();
            whole.then_some((tag.to_owned(), Duration::from_micros(took.parse().ok()?)))
        }
        _ => None,
    }
}

/// The times of bytes that go from a guest to the host and back, each after the one before.
pub(crate) fn vsock_round_trips(directory: &TempDir) -> Result<Series> {
    let image = directory.path().join("vsock-image");
    guest::image_with_init(&image, guest::bench());
    let run_dir = tempfile::tempdir_in(directory)?;
    let [device_socket, vsock] = ["device.sock", "vsock"].map(|name| run_dir.path().join(name));
    let host = UnixListener::bind(format!("{}_{VSOCK_PORT}", vsock.display()))?;
    let device = vmm::programs().into_iter().next().context("QEMU's vsock device is there")?.1;
    let of_machine = format!("guest-cid=3,socket={},uds-path={}", device_socket.display(), vsock.display());
    let mut device = Stopped(Command::new(device).args(["--vm", &of_machine]).stdin(Stdio::null()).spawn()?);
    wait_for(&device_socket, &mut device)?;
    let echo = thread::spawn(move || -> std::io::Result<()> {
        let (mut guest, _) = host.accept()?;
        let mut byte = [0];
        while guest.read(&mut byte)? == 1 {
            guest.write_all(&byte)?;
        }
        Ok(())
    });
    let chardev = format!("socket,id=vsock,path={}", device_socket.display());
    let mut command = qemu(&image, &format!("echo:{VSOCK_PORT}"), &[]);
    let output = command.args(["-chardev", &chardev, "-device", "vhost-user-vsock-pci,chardev=vsock"]).output()?;
    let console = String::from_utf8_lossy(&output.stdout);
    let times = console.lines().filter_map(|line| line.trim().strip_prefix("echo ")?.parse().ok());
    let times: Vec<_> = times.map(Duration::from_nanos).collect();
    ensure!(!times.is_empty(), "the guest got no echo:\n{console}");
    echo.join().map_err(|_| anyhow!("the host's side panicked"))??;
    Ok(Series::of(times))
}

/// The virtiofsd of the distribution: the Rust one, or the C one that came with QEMU before it.
fn stock(tree: &Path, socket: &Path) -> Result<Child> {
    let parent = tree.parent().context("the tree is in a directory")?;
    let rust = ["/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/bin/virtiofsd"].map(PathBuf::from);
    let c = Path::new("/usr/lib/qemu/virtiofsd");
    let mut command = if let Some(program) = rust.iter().find(|program| program.exists()) {
        let mut command = Command::new(program);
        command.args(["--cache=always", "--sandbox=none", "--shared-dir"]).arg(parent);
        command
    } else if c.exists() {
        let mut command = Command::new(c);
        command.args(["-o", "cache=always", "-o", "sandbox=chroot", "-o"]);
        command.arg(format!("source={}", parent.display()));
        command
    } else {
        bail!("there is no stock virtiofsd; images/setup.sh installs it along with QEMU")
    };
    command.arg(format!("--socket-path={}", socket.display()));
    let log = fs::File::create(socket.with_extension("log"))?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    command.spawn().with_context(|| format!("can't start {command:?}"))
}

/// Waits until a device listens.
fn wait_for(socket: &Path, device: &mut Stopped) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !socket.exists() {
        ensure!(device.0.try_wait()?.is_none() && Instant::now() < deadline, "nobody listens on {}", socket.display());
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Kills its process when it is dropped.
pub(super) struct Stopped(pub(super) Child);

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A machine like those of builds, without devices.
fn cloud_hypervisor(image: &Path) -> Command {
    let mut command = Command::new(&vmm::choice().program);
    command
        .args(["--memory", "size=2G,shared=on", "--cpus", "boot=2", "--serial", "tty", "--console", "off"])
        .args(["--cmdline", &format!("console=ttyS0 {KERNEL_PARAMETERS} job=off"), "--kernel"])
        .arg(image.join("kernel"))
        .arg("--initramfs")
        .arg(image.join("initramfs"));
    command
}

/// A machine like those of builds, with only these virtiofs devices.
fn qemu(image: &Path, job: &str, devices: &[(&str, &Path)]) -> Command {
    let khz = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mhz = khz
        .lines()
        .find(|line| line.starts_with("cpu MHz"))
        .and_then(|line| line.split(':').nth(1)?.trim().parse().ok());
    let khz = (mhz.unwrap_or(1000.0_f64) * 1000.0) as u64;
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-M", "microvm,pcie=on,memory-backend=memory", "-m", "2G", "-smp", "2", "-cpu", TCG_CPU])
        .args(["-object", "memory-backend-memfd,id=memory,size=2G,share=on", "-accel", "tcg,thread=multi"])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"])
        .arg("-kernel")
        .arg(image.join("kernel"))
        .arg("-initrd")
        .arg(image.join("initramfs"))
        .arg("-append")
        .arg(format!("{} job={job}", qemu_kernel_command_line(khz)));
    for (tag, socket) in devices {
        command
            .arg("-chardev")
            .arg(format!("socket,id={tag},path={}", socket.display()))
            .arg("-device")
            .arg(format!("vhost-user-fs-pci,chardev={tag},tag={tag},queue-size=512"));
    }
    let _ = std::io::stdout().flush();
    command
}

//! The outer machine: an emulated one whose KVM works, for hosts whose own does not. It is slow, and no security boundary:
//! programs in it can read the files of this user.
//!
//! ```text
//!   QEMU, emulating a CPU with SVM ── Debian's cloud kernel, kvm-amd, a script as init
//!     virtiofs  "host"     this host's whole file tree, read-only, below an overlay in memory for the command's writes
//!     port      "output"   the command's stdout and stderr, passed on at once
//!     port      "status"   "up" before the command, "exit N" after it; the command can't write there by accident
//!     serial               the kernel's console, shown when something goes wrong
//! ```

mod init;
mod share;

use std::{
    ffi::OsString,
    fs,
    io::{self, Read, Write},
    os::fd::OwnedFd,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use cofferdam::{
    machine::jail::{Program, Spawner},
    machine::vmm,
};
use cofferdam_images::{cache_dir, scripted_machine};
use tokio::{
    io::{AsyncBufRead, AsyncBufReadExt, BufReader, Lines},
    net::unix::pipe,
    runtime::Handle,
    select,
    time::timeout,
};

/// `kvm_amd` because QEMU emulates SVM and not VMX; `veth` for tests that need an internet.
const MODULES: &[&str] = &["virtio_pci", "virtiofs", "virtio_console", "overlay", "kvm_amd", "veth"];

/// A CPU without XSAVE and the features that need it. The kernels of inner guests would warn about these.
const CPU: &str = "max,-xsave,-xsaveopt,-xgetbv1,-avx,-pku,-mpx";

/// A CPU with XSAVE, for VMMs that need it. Two features stay off, since kernels fail with them: PKRU and bounds registers.
const CPU_WITH_XSAVE: &str = "max,-pku,-mpx";

/// One CPU. With two, and QEMU 7.2, the kernel dies within minutes: it patches its own code when the first VM starts or the
/// last one ends, and an emulated CPU may trap on a patch that is gone already ("Oops: int3").
const CPUS: &str = "1";

/// Time limit from the start to the first word on the status port. It takes five seconds on an idle host.
const BOOT_LIMIT: Duration = Duration::from_secs(180);

/// Time limit from the command's end to the machine's.
const END_LIMIT: Duration = Duration::from_secs(60);

/// An outer machine to be started.
#[derive(Debug, Clone)]
pub struct Outer {
    /// Memory, which also holds the files that the command writes.
    pub memory_mib: u32,
    /// Whether the processor has XSAVE. Older versions of cloud-hypervisor (v49) need it.
    pub xsave: bool,
}

impl Outer {
    /// Runs a command in a new machine, as root, with this process's environment and working directory. Its output is copied
    /// to `output` at once. Returns its exit code, or 128 plus the signal that ended it. Dropping the future ends the
    /// machine.
    ///
    /// `overdue` is polled from the command's start. When it is ready, the machine is ended.
    ///
    /// # Errors
    ///
    /// The machine can't be started, does not come up, or ends early, or `overdue` returned a reason to end it. The message
    /// has the end of the console.
    pub async fn run(
        &self,
        command: &[OsString],
        output: impl Write + Send + 'static,
        overdue: impl Future<Output = String>,
    ) -> Result<i32> {
        let qemu = vmm::survey().qemu.found.context("there is no QEMU; images/setup.sh installs it")?;
        let init = init::script(command)?;
        let files = scripted_machine(&cache_dir(), |line| eprintln!("nested: {line}"), MODULES, &init)?;
        let directory = tempfile::tempdir().context("can't make a temporary directory")?;
        fs::write(directory.path().join("initramfs"), files.initramfs)?;

        let (status, status_writer) = io::pipe()?;
        let (written, output_writer) = io::pipe()?;
        let mut lines = BufReader::new(pipe::Receiver::from_owned_fd(OwnedFd::from(status))?).lines();
        share::serve(&directory.path().join("host.sock"))?;
        let program = Program::new("qemu", qemu.program, directory.path())
            .args(self.arguments())
            .args(["-kernel".into(), files.kernel.into_os_string()])
            .descriptor(output_writer)
            .descriptor(status_writer);
        let mut machine = Spawner::without_walls(Handle::current())?.spawn(program).await?;
        let passed_on = pass_on(written, output)?;

        let result = async {
            let code = follow(&mut lines, overdue).await?;
            ensure!(timeout(END_LIMIT, machine.wait()).await.is_ok(), "the outer machine does not power off");
            Ok(code)
        };
        match result.await {
            Ok(code) => {
                passed_on.join().map_err(|_| anyhow!("the thread for the output panicked"))??;
                Ok(code)
            }
            Err(error) => {
                machine.kill().await;
                bail!("the outer machine failed: {error:#}; its console:\n{}", machine.said())
            }
        }
    }

    fn arguments(&self) -> Vec<String> {
        let memory = format!("memory-backend-memfd,id=memory,size={}M,share=on", self.memory_mib);
        let memory_mib = format!("{}M", self.memory_mib);
        let cpu = if self.xsave { CPU_WITH_XSAVE } else { CPU };
        let mut arguments = [
            ["-M", "q35,memory-backend=memory", "-accel", "tcg", "-cpu", cpu],
            ["-m", &memory_mib, "-smp", CPUS, "-object", &memory],
            ["-nodefaults", "-no-user-config", "-no-reboot", "-nographic", "-serial", "stdio"],
        ]
        .concat();
        arguments.extend(["-initrd", "initramfs", "-append", "console=ttyS0 quiet panic=-1"]);
        arguments.extend(["-chardev", "socket,id=host,path=host.sock"]);
        arguments.extend(["-device", "vhost-user-fs-pci,chardev=host,tag=host,queue-size=512"]);
        arguments.extend(["-device", "virtio-serial-pci"]);
        let mut arguments: Vec<_> = arguments.into_iter().map(str::to_owned).collect();
        for (descriptor, port) in [(3, "output"), (4, "status")] {
            arguments.extend(["-add-fd".to_owned(), format!("fd={descriptor},set={descriptor}")]);
            let file = format!("file,id={port},path=/dev/fdset/{descriptor},append=on");
            arguments.extend(["-chardev".to_owned(), file]);
            arguments.extend(["-device".to_owned(), format!("virtserialport,chardev={port},name={port}")]);
        }
        arguments
    }
}

/// The exit code, from the status port.
async fn follow(lines: &mut Lines<impl AsyncBufRead + Unpin>, overdue: impl Future<Output = String>) -> Result<i32> {
    let line = timeout(BOOT_LIMIT, lines.next_line()).await;
    let line = line.map_err(|_| anyhow!("it did not come up within {} seconds", BOOT_LIMIT.as_secs()))??;
    ensure!(line.as_deref() == Some("up"), "it ended before the command could start");
    let line = select! {
        line = lines.next_line() => line?,
        reason = overdue => bail!(reason),
    };
    match line.as_deref().and_then(|line| line.strip_prefix("exit ")?.parse().ok()) {
        Some(code) => Ok(code),
        None => bail!("it ended while the command ran"),
    }
}

/// A thread that copies the command's output until the machine has ended.
fn pass_on(
    mut written: io::PipeReader,
    mut output: impl Write + Send + 'static,
) -> Result<thread::JoinHandle<io::Result<()>>> {
    let copy = move || {
        let mut chunk = vec![0; 64 << 10];
        loop {
            match written.read(&mut chunk)? {
                0 => return Ok(()),
                // Flushed at once, in case the output is buffered.
                length => output.write_all(&chunk[..length]).and_then(|()| output.flush())?,
            }
        }
    };
    Ok(thread::Builder::new().name("output".to_owned()).spawn(copy)?)
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;
    use crate::slots;

    fn outcome(time_limit: Duration, script: &str) -> Result<i32> {
        let _slot = slots::take_one();
        let command = ["sh", "-c", script].map(OsString::from);
        let outer = Outer { memory_mib: 1024, xsave: false };
        let overdue = async {
            sleep(time_limit).await;
            "it is overdue".to_owned()
        };
        tokio::runtime::Runtime::new()?.block_on(outer.run(&command, io::stdout(), overdue))
    }

    #[test]
    fn kvm_works_and_the_exit_code_comes_back() {
        let script = "test -c /dev/kvm && grep -qw svm /proc/cpuinfo && test -d \"$PWD\" && exit 7";
        assert_eq!(outcome(Duration::from_secs(60), script).unwrap(), 7);
    }

    #[test]
    fn hangs_and_crashes_are_errors_in_time() {
        let error = outcome(Duration::from_secs(1), "sleep 1000").unwrap_err().to_string();
        assert!(error.contains("it is overdue"), "{error}");
        let script = "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 1000";
        let error = outcome(Duration::from_secs(60), script).unwrap_err().to_string();
        assert!(error.contains("it ended while the command ran") && error.contains("panic"), "{error}");
    }
}

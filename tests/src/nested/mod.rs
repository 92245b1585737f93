//! The outer machine: an emulated one whose KVM works, for hosts whose own does not. Slow, and no wall against anybody:
//! whatever runs in it can read what this user can read.
//!
//! ```text
//!   QEMU, emulating a CPU with SVM ── Debian's cloud kernel, kvm-amd, a script as the first program
//!     virtiofs  "host"     this host's whole file tree, read-only; what the command writes goes to memory above it
//!     port      "output"   the command's stdout and stderr, passed on as they come
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

/// `kvm_amd` because QEMU emulates SVM and not VMX.
const MODULES: &[&str] = &["virtio_pci", "virtiofs", "virtio_console", "overlay", "kvm_amd"];

/// Without XSAVE and what builds on it, about which the kernels of inner guests warn.
const CPU: &str = "max,-xsave,-xsaveopt,-xgetbv1,-avx,-pku,-mpx";

/// With it, for those that insist. Kernels can't cope with the others: no PKRU, no bounds registers.
const CPU_WITH_XSAVE: &str = "max,-pku,-mpx";

/// With two, and QEMU 7.2, the kernel dies within minutes: it patches its own code whenever a first VM is made or a last
/// one ends, and an emulated processor that runs into the patch traps after it is gone ("Oops: int3").
const CPUS: &str = "1";

/// From the start to the first word on the status port; on an idle host it takes five seconds.
const BOOT_LIMIT: Duration = Duration::from_secs(180);

/// From the command's end to that of the machine.
const END_LIMIT: Duration = Duration::from_secs(60);

/// An outer machine to be.
#[derive(Debug, Clone)]
pub struct Outer {
    /// Memory, which is also where everything goes that the command writes.
    pub memory_mib: u32,
    /// Whether the processor has XSAVE, without which older cloud-hypervisors (v49) start no machine.
    pub xsave: bool,
}

impl Outer {
    /// Runs a command in a new machine, with this process's environment and working directory, as root. Its output is
    /// written to `output` as it comes. The result is its exit code, or 128 and the signal that ended it. Dropping the
    /// future ends the machine.
    ///
    /// `overdue` is polled from the command's start. Once it is ready, the machine is ended.
    ///
    /// # Errors
    ///
    /// The machine can't be started, does not come up, ends early, or `overdue` says why it had to end. The message has
    /// the end of the console.
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
                // At once, whatever buffer the output has.
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
    fn what_hangs_or_falls_over_is_an_error_in_time() {
        let error = outcome(Duration::from_secs(1), "sleep 1000").unwrap_err().to_string();
        assert!(error.contains("it is overdue"), "{error}");
        let script = "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 1000";
        let error = outcome(Duration::from_secs(60), script).unwrap_err().to_string();
        assert!(error.contains("it ended while the command ran") && error.contains("panic"), "{error}");
    }
}

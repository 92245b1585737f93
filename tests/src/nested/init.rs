//! The init of the outer machine: a script for busybox.

use std::{
    env,
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt,
};

use anyhow::{Context, Result};

/// The script's beginning. Assignments of the command's environment variables follow.
///
/// The shell finds its own programs through /proc, so the mount of /proc itself needs the program's path. If anything fails,
/// the shell exits, the kernel panics, and the machine ends.
const BEFORE: &str = r#"#!/sh
set -e
(exec -a mount /sh -t proc proc /proc)
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
while read -r module; do insmod "/lib/$module"; done < /modules.order
chmod 666 /dev/kvm

mount -t virtiofs -o ro host /mnt
mount -t tmpfs -o size=100% tmpfs /scratch
mkdir /scratch/upper /scratch/work
mount -t overlay -o lowerdir=/mnt,upperdir=/scratch/upper,workdir=/scratch/work overlay /build-root
cd /build-root
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t devtmpfs devtmpfs dev
mkdir -p dev/pts dev/shm
mount -t devpts devpts dev/pts
mount -t tmpfs tmpfs dev/shm
ln -sf /proc/self/fd dev/fd
mount -t tmpfs -o size=100%,mode=1777 tmpfs run
ip link set lo up
ulimit -Hn 524288

while [ -z "$output" ] || [ -z "$status" ]; do
    for port in /sys/class/virtio-ports/*; do
        case $(cat "$port/name") in
            output) output=/dev/${port##*/} ;;
            status) status=/dev/${port##*/} ;;
        esac
    done
done

echo up > "$status"
set +e
env -i"#;

/// Follows the variables. The tree is moved to the root of a mount namespace, since processes that are only chrooted can make no
/// user namespaces.
const ENTER: &str = r#" unshare -m /sh -c 'cd /build-root && mount -o move . / &&
    exec chroot . /bin/sh -c "cd \"\$0\" && exec \"\$@\"" "$@"' sh"#;

/// The script's end, after the working directory and the command.
const AFTER: &str = r#" < /dev/null > "$output" 2>&1
echo "exit $?" > "$status"
poweroff -f
"#;

/// The script that runs `command`, found in `PATH`, with this process's environment and working directory.
pub(super) fn script(command: &[OsString]) -> Result<Vec<u8>> {
    let mut script = BEFORE.as_bytes().to_vec();
    // Temporary files go straight to memory. The host's directory is below an overlay, which costs time.
    let variables = env::vars_os().filter(|(key, _)| key != "TMPDIR").chain([("TMPDIR".into(), "/run".into())]);
    for (key, value) in variables {
        let mut assignment = key;
        assignment.push("=");
        assignment.push(value);
        word(&mut script, &assignment);
    }
    script.extend_from_slice(ENTER.as_bytes());
    word(&mut script, env::current_dir().context("this process has no working directory")?.as_os_str());
    for argument in command {
        word(&mut script, argument);
    }
    script.extend_from_slice(AFTER.as_bytes());
    Ok(script)
}

/// Appends one word, quoted.
fn word(script: &mut Vec<u8>, text: &OsStr) {
    script.extend_from_slice(b" '");
    for &byte in text.as_bytes() {
        match byte {
            b'\'' => script.extend_from_slice(br"'\''"),
            _ => script.push(byte),
        }
    }
    script.push(b'\'');
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn words_mean_themselves_to_a_shell() {
        let text = OsStr::from_bytes(b"it's $HOME `x` \\ \"q\" \n\xff *");
        let mut script = b"printf %s".to_vec();
        word(&mut script, text);
        let said = Command::new("/bin/sh").arg("-c").arg(OsStr::from_bytes(&script)).output().unwrap();
        assert_eq!(said.stdout, text.as_bytes());
    }
}

//! Programs for guests, and images of hostile guests.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::LazyLock,
};

use cofferdam_images::Image;

static PROBE: LazyLock<PathBuf> = LazyLock::new(|| compile("probe"));

static HOSTILE: LazyLock<PathBuf> = LazyLock::new(|| compile("hostile"));

static BENCH: LazyLock<PathBuf> = LazyLock::new(|| compile("bench"));

static CLIENT: LazyLock<PathBuf> = LazyLock::new(|| compile("client"));

static TRAFFIC: LazyLock<PathBuf> = LazyLock::new(|| compile("traffic"));

/// Code shared by the programs of `guest/`.
const SHARED: [&str; 3] = ["frames.rs", "modules.rs", "vsock.rs"];

/// Compiles a program of `guest/`, unless its source has been compiled before.
fn compile(name: &str) -> PathBuf {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest");
    let source = sources.join(name).with_extension("rs");
    let read = |path: &Path| fs::read(path).unwrap_or_else(|error| panic!("can't read {path:?}: {error}"));
    let text = [vec![read(&source)], SHARED.map(|name| read(&sources.join(name))).to_vec()].concat().concat();
    let directory = cofferdam_images::cache_dir().join("test-programs");
    fs::create_dir_all(&directory).expect("the cache directory can be written");
    let path = directory.join(format!("{name}-{}", blake3::hash(&text).to_hex()));
    if path.exists() {
        return path;
    }
    // Other tests may be compiling it, too. The final name never refers to an incomplete file.
    let aside = tempfile::tempdir_in(&directory).expect("the cache directory can be written");
    let made = aside.path().join(name);
    let compiler = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let compiled = Command::new(compiler)
        .args(["--edition=2024", "-Copt-level=1", "-Cpanic=abort", "-Ctarget-feature=+crt-static"])
        .args(["--target", "x86_64-unknown-linux-gnu", "-o"])
        .arg(&made)
        .arg(&source)
        .output()
        .expect("rustc can be started");
    let complaints = String::from_utf8_lossy(&compiled.stderr);
    assert!(compiled.status.success(), "{source:?} does not compile:\n{complaints}");
    fs::rename(&made, &path).expect("the cache directory can be written");
    path
}

/// A static program that runs in guests, see `guest/probe.rs`. It is compiled once.
pub fn probe() -> &'static Path {
    &PROBE
}

/// A static program that uses the network in guests, see `guest/client.rs`. It is compiled once.
pub fn client() -> &'static Path {
    &CLIENT
}

/// A static program that measures the network of guests, see `guest/traffic.rs`. It is compiled once.
pub fn traffic() -> &'static Path {
    &TRAFFIC
}

/// The init of the benchmarks' guests, see `guest/bench.rs`. It is compiled once.
pub fn bench() -> &'static Path {
    &BENCH
}

/// Compiles all programs into the cache. Later uses of the same cache need no compiler.
pub fn compile_all() {
    for program in [&PROBE, &HOSTILE, &BENCH, &CLIENT, &TRAFFIC] {
        LazyLock::force(program);
    }
}

/// Makes a copy of the guest image whose init does this job, see `guest/hostile.rs`.
pub fn hostile_image(directory: &Path, job: &str) {
    image_with(crate::image().1, directory, &[("init", &read(&HOSTILE)), ("job", job.as_bytes())]);
}

/// The same for a job that sends frames of its own. It has Debian's kernel, since the minimal one has no packet sockets.
pub fn framing_image(directory: &Path, job: &str) {
    image_with(crate::debian_image().1, directory, &[("init", &read(&HOSTILE)), ("job", job.as_bytes())]);
}

/// Makes a copy of the guest image whose clock is wrong before guest-init starts: it is in the year 2001.
pub fn late_image(directory: &Path) {
    let (_, image) = crate::image();
    let initramfs = fs::read(&image.initramfs).expect("the image is there");
    let real = find(&initramfs, "init");
    image_with(image, directory, &[("init", &read(&HOSTILE)), ("job", b"lose the clock"), ("real-init", real)]);
}

/// Makes a copy of the guest image with another init.
pub fn image_with_init(directory: &Path, init: &Path) {
    image_with(crate::image().1, directory, &[("init", &read(init))]);
}

fn read(program: &Path) -> Vec<u8> {
    fs::read(program).expect("the program is there")
}

/// Makes a copy of a guest image with these files added or replaced.
fn image_with(image: &Image, directory: &Path, files: &[(&str, &[u8])]) {
    let mut initramfs = fs::read(&image.initramfs).expect("the image is there");
    initramfs.resize(initramfs.len().next_multiple_of(4), 0);
    // The kernel unpacks the archives in turn, and a later file replaces an earlier one.
    // Rust's runtime aborts without a console or this.
    append(&mut initramfs, "dev/null", 0o020_666, (1, 3), &[]);
    for (name, contents) in files {
        append(&mut initramfs, name, 0o100_755, (0, 0), contents);
    }
    append(&mut initramfs, "TRAILER!!!", 0, (0, 0), &[]);
    fs::create_dir_all(directory).expect("a temporary directory can be written");
    let place = |name: &str| directory.join(name);
    fs::write(place("initramfs"), initramfs).expect("a temporary directory can be written");
    for file in [&image.kernel, &image.scratch] {
        fs::copy(file, place(&file.file_name().expect("it is a file").to_string_lossy())).expect("the image is there");
    }
}

/// The contents of a file in a newc archive.
fn find<'a>(mut archive: &'a [u8], name: &str) -> &'a [u8] {
    loop {
        let field = |index: usize| {
            let digits = str::from_utf8(&archive[6 + 8 * index..][..8]).expect("it is a header");
            usize::from_str_radix(digits, 16).expect("it is a header")
        };
        let (length, name_length) = (field(6), field(11));
        let contents = (110 + name_length).next_multiple_of(4);
        if &archive[110..][..name_length - 1] == name.as_bytes() {
            return &archive[contents..][..length];
        }
        archive = archive.get((contents + length).next_multiple_of(4)..).expect("the file is in the archive");
    }
}

/// One entry of a newc archive, as Linux's `Documentation/driver-api/early-userspace/buffer-format.rst` has it.
fn append(archive: &mut Vec<u8>, name: &str, mode: u32, (major, minor): (u32, u32), contents: &[u8]) {
    let length = contents.len() as u32;
    let name_length = name.len() as u32 + 1;
    archive.extend(b"070701");
    for field in [4711, mode, 0, 0, 1, 0, length, 0, 0, major, minor, name_length, 0] {
        archive.extend(format!("{field:08x}").bytes());
    }
    archive.extend(name.bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(contents);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

//! Roots of builds: images, archives, directories, and names for them.

use std::{
    ffi::OsStr,
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
};

use cofferdam_tests::{Cofferdam, Daemon, Outcome};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

/// A store that no build uses, so no image is needed.
fn store() -> Cofferdam {
    Cofferdam::with_image("/nonexistent")
}

/// An entry of a layer: its path, kind and contents, or target.
type Entry<'a> = (&'a str, EntryType, &'a str);

fn file<'a>(path: &'a str, contents: &'a str) -> Entry<'a> {
    (path, EntryType::Regular, contents)
}

/// A layer. Its files are executable and set-user-ID if their names end in `sh`.
fn layer(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut archive = Builder::new(Vec::new());
    for (path, kind, text) in entries {
        let mut header = Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_mode(if path.ends_with("sh") { 0o4755 } else { 0o644 });
        let contents = if *kind == EntryType::Regular { text.as_bytes() } else { b"" };
        header.set_size(contents.len() as u64);
        let raw = header.as_gnu_mut().expect("it is one");
        raw.name[..path.len()].copy_from_slice(path.as_bytes());
        if contents.is_empty() {
            raw.linkname[..text.len()].copy_from_slice(text.as_bytes());
        }
        header.set_cksum();
        archive.append(&header, contents).expect("memory has room");
    }
    archive.into_inner().expect("memory has room")
}

fn hex(bytes: &[u8]) -> String {
    data_encoding::HEXLOWER.encode(&Sha256::digest(bytes))
}

/// Writes an image's OCI layout below the test's files, and returns its path.
fn layout(cofferdam: &Cofferdam, name: &str, architecture: &str, layers: &[Vec<u8>]) -> PathBuf {
    let blob = |kind: &str, bytes: &[u8]| {
        cofferdam.file(&format!("{name}/blobs/sha256/{}", hex(bytes)), bytes);
        let media_type = format!("application/vnd.oci.image.{kind}");
        json!({ "mediaType": media_type, "digest": format!("sha256:{}", hex(bytes)), "size": bytes.len() })
    };
    let ids: Vec<_> = layers.iter().map(|layer| format!("sha256:{}", hex(layer))).collect();
    let rootfs = json!({ "type": "layers", "diff_ids": ids });
    let config = json!({ "os": "linux", "architecture": architecture, "config": {}, "rootfs": rootfs });
    let config = blob("config.v1+json", config.to_string().as_bytes());
    let layers: Vec<Value> = layers.iter().map(|layer| blob("layer.v1.tar", layer)).collect();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": layers,
    });
    let mut manifest = blob("manifest.v1+json", manifest.to_string().as_bytes());
    manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": "1.0" });
    cofferdam.file(&format!("{name}/oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#);
    cofferdam.file(&format!("{name}/index.json"), json!({ "schemaVersion": 2, "manifests": [manifest] }).to_string());
    cofferdam.files().join(name)
}

/// The layers of a small root.
fn layers() -> [Vec<u8>; 2] {
    let lower = [
        file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"),
        file("etc/resolv.conf", "nameserver 10.0.0.1\n"),
        file("usr/bin/script.sh", "#!/bin/sh\necho from a script\n"),
        file("gone", "not in the upper layer"),
        ("bin", EntryType::Symlink, "usr/bin"),
        ("dev/null", EntryType::Char, ""),
        ("tmp/", EntryType::Directory, ""),
    ];
    let upper = [file(".wh.gone", ""), file("etc/motd", "hello\n"), ("etc/linked", EntryType::Link, "etc/passwd")];
    [layer(&lower), layer(&upper)]
}

fn imports<S: AsRef<OsStr>>(cofferdam: &Cofferdam, arguments: impl IntoIterator<Item = S>) -> Outcome {
    let arguments = arguments.into_iter().map(|argument| argument.as_ref().to_owned());
    cofferdam.command([OsStr::new("import").to_owned()].into_iter().chain(arguments))
}

const LOOK_AROUND: &str = "
    id -un > out
    cat /etc/motd /inputs/in >> out
    script.sh >> out
    grep -c . /etc/linked >> out
    ls -d /gone /etc/resolv.conf >> out 2>/dev/null
    echo x > /tmp/x && echo x > /dev/null && test -r /proc/self/stat && echo usual >> out
    touch /etc/new 2>/dev/null || echo read-only >> out";

const SEEN: &str = "nixbld\nhello\nan input\nfrom a script\n1\nusual\nread-only\n";

#[test]
fn a_build_finds_an_image_as_its_root() {
    let cofferdam = Cofferdam::new();
    let layout = layout(&cofferdam, "image", "amd64", &layers());
    let input = cofferdam.file("input", "an input\n");
    let build = || cofferdam.build().input("in", &input).output("build/out").exported();
    let built = build().flag("--root", format!("oci:{}", layout.display())).shell(LOOK_AROUND).succeeds();
    assert_eq!(built.read("build/out"), SEEN);
    let told = "of the root, 1 device nodes, fifos and sockets were left out, and 1 files are no longer set-user-ID";
    assert!(built.stderr.contains(told), "{built}");

    let mut tar = fs::read(layout.join("blobs/sha256").join(hex(&layers()[0]))).unwrap();
    tar.truncate(tar.len() - 1024);
    tar.extend_from_slice(&layers()[1]);
    cofferdam.file("root.tar", tar);
    let built = cofferdam.build().flag("--root", "tar:root.tar").run(["/bin/script.sh"]);
    built.build_fails("interpreter_not_found");
    let built = cofferdam.build().flag("--root", "tar:root.tar").run(["/bin/sh"]);
    built.build_fails("command_not_found").says("caused by: the root has no /bin/sh").says("--bin-sh");
}

#[test]
fn a_named_root_is_copied_to_a_daemon_that_lacks_it() {
    let cofferdam = Cofferdam::new();
    let layout = layout(&cofferdam, "image", "amd64", &layers());
    let source = format!("oci:{}:1.0", layout.display());
    // Another user's names: the daemon's store has nothing of it.
    let own = cofferdam.files().join("own");
    let variables = [("COFFERDAM_STATE_DIR", own.as_path())];
    cofferdam.command_with(&variables, ["store", "root", "add", "small", &source]).succeeds();
    let daemon = Daemon::start(&cofferdam, "");
    let input = cofferdam.file("input", "an input\n");
    for root in ["small", &source] {
        let build = cofferdam.build().on(&daemon).input("in", &input).output("build/out").exported();
        let built = build.host_variable("COFFERDAM_STATE_DIR", &own).flag("--root", root).shell(LOOK_AROUND).succeeds();
        assert_eq!(built.read("build/out"), SEEN, "{root}");
    }
    daemon.end();
}

#[test]
fn every_format_gives_the_same_root_and_the_second_time_costs_nothing() {
    let cofferdam = store();
    let files = cofferdam.files();
    let layout = layout(&cofferdam, "image", "amd64", &layers());
    let node = |format: &str, path: &str| {
        let imported = imports(&cofferdam, ["--format", format, path]).succeeds();
        imported.stdout.split('\t').next().expect("there is a node").to_owned()
    };
    let first = node("oci", "image");
    let docker = format!("docker-archive:{}", files.join("saved.tar").display());
    let copied = Command::new("skopeo")
        .args(["--insecure-policy", "copy", "--quiet"])
        .args([format!("oci:{}:1.0", layout.display()), docker])
        .output();
    let copied = copied.expect("skopeo is installed");
    assert!(copied.status.success(), "{}", String::from_utf8_lossy(&copied.stderr));
    assert_eq!(node("docker", "saved.tar"), first);
    let archived = Command::new("tar").args(["-C", "image", "-czf", "image.tgz", "."]).current_dir(&files).status();
    assert!(archived.expect("tar is installed").success());
    assert_eq!(node("oci", "image.tgz"), first);
    cofferdam.command(["export", &first, "unpacked"]).succeeds();
    nix::unistd::mkfifo(&files.join("unpacked/dev/initctl"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let imported = imports(&cofferdam, ["--format", "rootfs", "unpacked"]).succeeds();
    assert!(
        imported.stdout.starts_with(&first) && imported.stderr.contains("of the root, 1 device nodes"),
        "{imported}"
    );

    // Nothing but the manifest is read again, as long as the store has the image.
    let upper = layout.join("blobs/sha256").join(hex(&layers()[1]));
    fs::remove_file(&upper).unwrap();
    assert_eq!(node("oci", "image"), first);
    cofferdam.command(["store", "gc", "--keep", "0s"]).succeeds();
    imports(&cofferdam, ["--format", "oci", "image"]).exits_with(2).says("is missing from the layout");
}

#[test]
fn named_roots_are_kept_until_they_are_removed() {
    let cofferdam = store();
    layout(&cofferdam, "image", "amd64", &layers());
    cofferdam.command(["store", "root", "add", "debian-12", "oci:image"]).succeeds();
    let listed = cofferdam.command(["store", "root", "list"]).succeeds();
    assert!(listed.stdout.starts_with("dir:") && listed.stdout.ends_with("\tdebian-12\n"), "{listed}");
    cofferdam.command(["store", "gc", "--keep", "0s"]).succeeds();
    let exported = cofferdam.export(listed.stdout.split('\t').next().expect("there is a node"));
    assert_eq!(fs::read_to_string(exported.join("etc/motd")).expect("it is there"), "hello\n");
    let unknown = |name: &str| cofferdam.command(["store", "root", "add", "other", name]).exits_with(2);
    unknown("debian-13").says("there is no root \"debian-13\"").says("did you mean \"debian-12\"?");
    unknown("xyz").says("cofferdam store root list");
    cofferdam.command(["store", "root", "add", "copy", "debian-12"]).succeeds();
    cofferdam.command(["store", "root", "remove", "debian-12"]).succeeds();
    cofferdam.command(["store", "root", "remove", "copy"]).succeeds();
    cofferdam.command(["store", "gc", "--keep", "0s"]).succeeds();
    assert!(cofferdam.verified_blobs().is_empty());
}

#[test]
fn wrong_images_leave_nothing_in_the_store() {
    let cofferdam = store();
    let image = |name: &str, entries: &[Entry<'_>]| {
        layout(&cofferdam, name, "amd64", &[layer(&[file("good", "imported first\n")]), layer(entries)]);
    };
    image("up", &[file("a/../../b", "")]);
    image("link", &[("a", EntryType::Link, "../../etc/shadow")]);
    image("away", &[("a", EntryType::Link, "/etc/shadow")]);
    image("root", &[file(".wh..", "")]);
    image("damaged", &[file("a", "contents")]);
    let changed = layer(&[file("a", "contents")]);
    cofferdam.file(&format!("damaged/blobs/sha256/{}", hex(&changed)), vec![0; changed.len()]);
    image("bomb", &[file("a", &"x".repeat(50_000))]);
    layout(&cofferdam, "foreign", "arm64", &layers());
    cofferdam.file("text", "no archive");
    for (arguments, words) in [
        (&["--format", "oci", "up"][..], "layer 2 of 2 is refused"),
        (&["--format", "oci", "link"], "leads out of the root"),
        (&["--format", "oci", "away"], "no file before it has that path"),
        (&["--format", "oci", "root"], "a layer can't remove its root"),
        (&["--format", "oci", "damaged"], "layer 2 of 2 does not have its digest"),
        (&["--format", "oci", "--archive-limit", "20K", "bomb"], "--archive-limit with a larger value"),
        (&["--format", "oci", "--archive-files", "1", "bomb"], "--archive-files with a larger value"),
        (&["--format", "oci", "foreign"], "there is no image for linux/amd64: it has linux/arm64"),
        (&["--format", "oci", "up:2.0"], "it has 1.0"),
        (&["--format", "oci", "text"], "is no image"),
        (&["--format", "docker", "text"], "is no image"),
        (&["--format", "docker", "up"], "has no manifest.json"),
        (&["--format", "rootfs", "text"], "can't be imported"),
        (&["--format", "oci", "none"], "No such file"),
        (&["--format", "oci", "oci://registry.example"], "must be oci://HOST/NAME:TAG"),
        (&["--platform", "linux", "--format", "oci", "up"], "write OS/ARCHITECTURE"),
    ] {
        imports(&cofferdam, arguments).exits_with(2).says(words);
        assert!(cofferdam.verified_blobs().is_empty(), "{arguments:?} left something");
    }
    let root = |root: &str| cofferdam.command(["store", "root", "add", "x", root]).exits_with(2);
    root("./text").says("a root must be a directory").says("tar:");
    root("text").says("a root must be a directory");
    root("./none").says("No such file");
}

/// A registry on a port of this host, which ends with the test.
struct Registry {
    process: Child,
    address: String,
}

impl Registry {
    fn start(cofferdam: &Cofferdam) -> Self {
        let passwords = "user:$2b$04$vv.sQwEr8ZHOTN199wJOwe0U2siaArH7sI/19YE07QlaWeD/tJoGq\n";
        let config = json!({
            "version": 0.1,
            "log": { "level": "info" },
            "storage": { "filesystem": { "rootdirectory": cofferdam.files().join("registry") } },
            "http": { "addr": "127.0.0.1:0" },
            "auth": { "htpasswd": { "realm": "tests", "path": cofferdam.file("passwords", passwords) } },
        });
        let config = cofferdam.file("registry.yml", config.to_string());
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(config).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut process = command.spawn().expect("docker-registry is installed");
        let mut lines = BufReader::new(process.stderr.take().expect("it is piped")).lines();
        let address = lines.by_ref().map_while(Result::ok).find_map(|line| {
            let (_, rest) = line.split_once("listening on ")?;
            Some(rest.split('"').next()?.to_owned())
        });
        thread::spawn(move || lines.for_each(drop));
        Self { process, address: address.expect("it says where it listens") }
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn images_come_from_a_registry_with_the_login_of_docker() {
    let cofferdam = store();
    let layout = layout(&cofferdam, "image", "amd64", &layers());
    let registry = Registry::start(&cofferdam);
    let pushed = Command::new("skopeo")
        .args(["--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false", "--dest-creds=user:open sesame"])
        .arg(format!("oci:{}:1.0", layout.display()))
        .arg(format!("docker://{}/small:1.0", registry.address))
        .output()
        .expect("skopeo is installed");
    assert!(pushed.status.success(), "{}", String::from_utf8_lossy(&pushed.stderr));

    let docker = cofferdam.files().join("docker");
    let reference = format!("oci://{}/small:1.0", registry.address);
    let import = |reference: &str, docker: &Path| {
        cofferdam.command_with(&[("DOCKER_CONFIG", docker)], ["import", "--format", "oci", reference])
    };
    let refused = import(&reference, &docker).exits_with(2);
    refused
        .says("wants a login")
        .says(&format!("docker login` or `skopeo login`, which writes {}", docker.join("config.json").display()));
    for (password, works) in [("wrong", false), ("open sesame", true)] {
        let auth = data_encoding::BASE64.encode(format!("user:{password}").as_bytes());
        cofferdam.file("docker/config.json", json!({ "auths": { &registry.address: { "auth": auth } } }).to_string());
        let outcome = import(&reference, &docker);
        if !works {
            outcome.exits_with(2).says("refuses the one in Docker's configuration");
            continue;
        }
        let pulled = outcome.succeeds();
        let local = imports(&cofferdam, ["--format", "oci", "image"]).succeeds();
        assert_eq!(pulled.stdout.split('\t').next(), local.stdout.split('\t').next());
        let digest = pulled.stderr.lines().find_map(|line| line.split_once(" is ")).expect("it is told").1.to_owned();
        let by_digest = format!("oci://{}/small@{digest}", registry.address);
        import(&by_digest, &docker).succeeds();
        import(&format!("oci://{}/small@sha256:{}", registry.address, hex(b"")), &docker).exits_with(2);
        import(&reference.replace("1.0", "2.0"), &docker).exits_with(2).says("answers 404");
    }
}

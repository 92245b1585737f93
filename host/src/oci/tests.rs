use std::{fs, io::Write as _, path::Path};

use cofferdam_castore::{
    Directory, PathComponent,
    archive::{ArchiveError, Compression, Compressor},
    import::import_path,
    tar,
};
use futures::executor::block_on;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;

use super::*;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// An image on disk that a test makes, as an OCI layout.
struct Layout {
    dir: tempfile::TempDir,
    entries: Vec<Value>,
}

impl Layout {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
        Self { dir, entries: Vec::new() }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn blob_path(&self, digest: &str) -> std::path::PathBuf {
        self.path().join("blobs/sha256").join(digest.strip_prefix("sha256:").unwrap())
    }

    fn blob(&self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = Digest::of(bytes).to_string();
        fs::write(self.blob_path(&digest), bytes).unwrap();
        json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
    }

    fn document(&self, media_type: &str, document: &Value) -> Value {
        self.blob(media_type, document.to_string().as_bytes())
    }

    /// Adds the manifest of an image; returns its descriptor.
    fn image(&self, platform: &str, layers: &[Vec<u8>]) -> Value {
        let layers: Vec<_> =
            layers.iter().map(|layer| self.blob("application/vnd.oci.image.layer.v1.tar", layer)).collect();
        let (os, architecture) = platform.split_once('/').unwrap();
        let config = json!({ "os": os, "architecture": architecture, "rootfs": { "type": "layers", "diff_ids": [] } });
        let config = self.document("application/vnd.oci.image.config.v1+json", &config);
        self.document(MANIFEST, &json!({ "schemaVersion": 2, "config": config, "layers": layers }))
    }

    fn entry(mut self, mut descriptor: Value, platform: Option<(&str, &str)>, name: Option<&str>) -> Self {
        if let Some((os, architecture)) = platform {
            descriptor["platform"] = json!({ "os": os, "architecture": architecture });
        }
        if let Some(name) = name {
            descriptor["annotations"] = json!({ "org.opencontainers.image.ref.name": name });
        }
        self.entries.push(descriptor);
        self.write_index();
        self
    }

    fn write_index(&self) {
        let index = json!({ "schemaVersion": 2, "manifests": self.entries });
        fs::write(self.path().join("index.json"), index.to_string()).unwrap();
    }

    fn imported(&self, name: Option<&str>, platform: &str) -> Result<Vec<String>, OciError> {
        names_in(self.path(), name, platform)
    }
}

/// The names in the root of the image at a path.
fn names_in(path: &Path, name: Option<&str>, platform: &str) -> Result<Vec<String>, OciError> {
    let files = Files::open(path, 1 << 20)?;
    let manifest = in_layout(&files, name, &platform.parse().unwrap())?;
    names(|store| import(store, &files, &manifest, Limits::default()))
}

fn names(import: impl FnOnce(&Store) -> Result<(Node, Lost), OciError>) -> Result<Vec<String>, OciError> {
    let store = Store::memory();
    let (node, _) = import(&store)?;
    let Node::Directory { digest, .. } = node else { panic!("it is no directory") };
    let root = block_on(store.directories.get(&digest)).unwrap().unwrap();
    Ok(root.nodes().map(|(name, _)| name.to_string()).collect())
}

/// A layer with some empty files.
fn layer(names: &[&str], compression: Compression) -> Vec<u8> {
    let store = Store::memory();
    let node = block_on(async {
        let mut writer = store.blobs.open_write().await;
        writer.write_all(b"").await.unwrap();
        let digest = writer.close().await.unwrap();
        let file =
            |name: &&str| (PathComponent::try_from(*name).unwrap(), Node::File { digest, size: 0, executable: false });
        let directory = Directory::try_from_iter(names.iter().map(file)).unwrap();
        let node = directory.to_node();
        store.directories.put(directory).await.unwrap();
        node
    });
    let mut bytes = Compressor::new(Vec::new(), compression).unwrap();
    tar::write(&store, &node, Path::new("layer"), &mut bytes, &|| false).unwrap();
    bytes.finish().unwrap()
}

fn layers() -> Vec<Vec<u8>> {
    vec![
        layer(&["a", "b"], Compression::Gzip),
        layer(&["c", ".wh.a"], Compression::Zstd),
        layer(&["d", ".wh.c"], Compression::None),
    ]
}

fn one() -> Layout {
    let layout = Layout::new();
    let image = layout.image("linux/amd64", &layers());
    layout.entry(image, None, None)
}

/// A tar archive of a directory.
fn archive(dir: &Path, compression: Compression) -> tempfile::NamedTempFile {
    let store = Store::memory();
    let node = import_path(&store, dir).unwrap();
    let mut out = Compressor::new(Vec::new(), compression).unwrap();
    tar::write(&store, &node, Path::new("archive"), &mut out, &|| false).unwrap();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&out.finish().unwrap()).unwrap();
    file
}

#[test]
fn layers_lie_over_each_other_whatever_their_compression() {
    let layout = one();
    assert_eq!(layout.imported(None, "linux/amd64").unwrap(), ["b", "d"]);
    for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
        let archive = archive(layout.path(), compression);
        assert_eq!(names_in(archive.path(), None, "linux/amd64").unwrap(), ["b", "d"], "{compression:?}");
    }
    let large = archive(layout.path(), Compression::Gzip);
    let error = Files::open(large.path(), 1000).err().unwrap().to_string();
    assert!(error.contains("must not have more than 1000 bytes"), "{error}");
}

#[test]
fn the_platform_is_chosen_through_indexes() {
    let layout = Layout::new();
    let [amd, arm] = ["linux/amd64", "linux/arm64"]
        .map(|platform| layout.image(platform, &[layer(&[&platform[6..]], Compression::None)]));
    let mut of_arm = arm;
    of_arm["platform"] = json!({ "os": "linux", "architecture": "arm64", "variant": "v8" });
    let mut attestation = layout.document(MANIFEST, &json!({ "no": "image" }));
    attestation["platform"] = json!({ "os": "unknown", "architecture": "unknown" });
    attestation["annotations"] = json!({ "vnd.docker.reference.type": "attestation-manifest" });
    // Without a platform in the index, its configuration has it.
    let index = layout.document(INDEX, &json!({ "manifests": [attestation, of_arm, amd] }));
    let layout = layout.entry(index, None, None);
    assert_eq!(layout.imported(None, "linux/amd64").unwrap(), ["amd64"]);
    assert_eq!(layout.imported(None, "linux/arm64").unwrap(), ["arm64"]);
    assert_eq!(layout.imported(None, "linux/arm64/v8").unwrap(), ["arm64"]);
    let error = layout.imported(None, "linux/riscv64").unwrap_err().to_string();
    assert_eq!(error, "there is no image for linux/riscv64: it has linux/amd64, linux/arm64/v8");
}

#[test]
fn several_images_are_told_by_their_names() {
    let layout = Layout::new();
    let [one, other] = ["one", "other"].map(|name| layout.image("linux/amd64", &[layer(&[name], Compression::None)]));
    let layout =
        layout.entry(one.clone(), None, Some("1.0")).entry(other, None, Some("2.0")).entry(one, None, Some("latest"));
    assert_eq!(layout.imported(Some("2.0"), "linux/amd64").unwrap(), ["other"]);
    assert_eq!(layout.imported(Some("latest"), "linux/amd64").unwrap(), ["one"]);
    for name in [None, Some("3.0")] {
        let error = layout.imported(name, "linux/amd64").unwrap_err().to_string();
        assert_eq!(error, "there is not one image to choose: it has 1.0, 2.0, latest", "{name:?}");
    }
}

#[test]
fn every_blob_must_have_its_digest() {
    let mut seen = Vec::new();
    for blob in fs::read_dir(one().path().join("blobs/sha256")).unwrap() {
        let blob = blob.unwrap().file_name().into_string().unwrap();
        let layout = one();
        let path = layout.blob_path(&format!("sha256:{blob}"));
        let mut bytes = fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        // A space more in a document, a changed byte in a layer, and a byte more.
        for changed in [
            {
                bytes[last] ^= 1;
                bytes.clone()
            },
            {
                bytes[last] ^= 1;
                [&bytes[..], b" "].concat()
            },
            bytes[..last].to_vec(),
        ] {
            fs::write(&path, changed).unwrap();
            let error = layout.imported(None, "linux/amd64").unwrap_err();
            assert!(matches!(error, OciError::Digest { expected, .. } if expected.hex() == blob), "{error:?}");
            seen.push(error.to_string());
        }
        fs::remove_file(&path).unwrap();
        let error = layout.imported(None, "linux/amd64").unwrap_err().to_string();
        assert!(error.contains("is missing from the layout"), "{error}");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let error = layout.imported(None, "linux/amd64").unwrap_err().to_string();
        assert!(error.contains("must be a regular file"), "{error}");
    }
    for part in ["the manifest", "the image's configuration", "layer 1 of 3", "layer 2 of 3", "layer 3 of 3"] {
        assert!(seen.iter().any(|error| error.starts_with(part)), "{part}: {seen:?}");
    }
}

#[test]
fn documents_that_make_no_sense_are_refused_with_the_rule() {
    let refused = |descriptor: &dyn Fn(&Layout) -> Value| {
        let layout = Layout::new();
        let descriptor = descriptor(&layout);
        layout.entry(descriptor, None, None).imported(None, "linux/amd64").unwrap_err().to_string()
    };
    let long = vec![b' '; 5 << 20];
    for (descriptor, words) in [
        (
            &(|_: &Layout| json!({ "digest": "sha256:../../etc/passwd", "size": 1 })) as &dyn Fn(&Layout) -> Value,
            "64 hexadecimal digits",
        ),
        (&|_: &Layout| json!({ "digest": "md5:00", "size": 1 }), "64 hexadecimal digits"),
        (&|_: &Layout| json!({ "digest": Digest::of(b"").to_string(), "size": -1 }), "invalid value"),
        (&|layout: &Layout| layout.blob(MANIFEST, &long), "must not be larger than 4194304 bytes"),
        (&|layout: &Layout| layout.blob(MANIFEST, b"{"), "is wrong"),
        (&|layout: &Layout| layout.blob(MANIFEST, "[".repeat(100_000).as_bytes()), "is wrong"),
        (
            &|layout: &Layout| layout.document(MANIFEST, &json!({ "layers": [] })),
            "must be an index of manifests, or a manifest",
        ),
        (&|layout: &Layout| layout.document(MANIFEST, &json!({ "manifests": [], "layers": [] })), "must be an index"),
        (&|layout: &Layout| layout.image("linux/amd64", &vec![vec![]; 1025]), "more than 1024 layers"),
        (
            &|layout: &Layout| {
                let manifest = layout.image("windows/amd64", &[]);
                layout.document(INDEX, &json!({ "manifests": vec![manifest; 70] }))
            },
            "more than 64 documents",
        ),
    ] {
        let error = refused(descriptor);
        assert!(error.contains(words), "{words}: {error}");
    }
    let layout = one();
    fs::write(layout.path().join("index.json"), &long).unwrap();
    assert!(layout.imported(None, "linux/amd64").unwrap_err().to_string().contains("must not be larger"));
    fs::remove_file(layout.path().join("index.json")).unwrap();
    assert!(layout.imported(None, "linux/amd64").unwrap_err().to_string().contains("has no index.json"));
}

#[test]
fn a_layer_that_expands_without_end_is_stopped() {
    let layout = Layout::new();
    let bomb = tar_of_zeros(64 << 20);
    let image = layout.image("linux/amd64", &[bomb]);
    let layout = layout.entry(image, None, None);
    let files = Files::open(layout.path(), 1 << 20).unwrap();
    let manifest = in_layout(&files, None, &Platform::host()).unwrap();
    let limits = Limits { entries: 10, bytes: 1 << 20 };
    let error = import(&Store::memory(), &files, &manifest, limits).unwrap_err();
    assert!(matches!(&error, OciError::Layer { number: 1, of: 1, source: ArchiveError::Limit { .. } }), "{error:?}");
}

/// A compressed layer with one file of zeros.
fn tar_of_zeros(bytes: usize) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    fs::File::create(dir.path().join("zeros")).unwrap().set_len(bytes as u64).unwrap();
    fs::read(archive(dir.path(), Compression::Gzip).path()).unwrap()
}

/// An archive of `docker save`: the files, and what `manifest.json` says.
struct SavedFiles {
    dir: tempfile::TempDir,
    items: Vec<Value>,
}

impl SavedFiles {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), items: Vec::new() }
    }

    fn file(&self, path: &str, bytes: &[u8]) {
        let path = self.dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn image(mut self, tag: &str, architecture: &str, layers: &[(&str, &[u8])], diff_ids: &[Digest]) -> Self {
        let diff_ids: Vec<_> = diff_ids.iter().map(ToString::to_string).collect();
        let config =
            json!({ "os": "linux", "architecture": architecture, "rootfs": { "diff_ids": diff_ids } }).to_string();
        let name = format!("{}.json", Digest::of(config.as_bytes()).hex());
        self.file(&name, config.as_bytes());
        for (path, layer) in layers {
            self.file(path, layer);
        }
        let paths: Vec<_> = layers.iter().map(|(path, _)| path).collect();
        self.items.push(json!({ "Config": name, "RepoTags": [tag], "Layers": paths }));
        self.file("manifest.json", json!(self.items).to_string().as_bytes());
        self
    }

    fn imported(&self) -> Result<Vec<String>, OciError> {
        let archive = archive(self.dir.path(), Compression::None);
        let files = Files::open(archive.path(), 1 << 20)?;
        let chosen = saved(&files, &Platform::host())?;
        names(|store| import_saved(store, &files, &chosen, Limits::default()))
    }
}

#[test]
fn archives_of_docker_are_read_with_the_digests_of_their_configuration() {
    let [lower, upper] = [&["a", "b"][..], &["c", ".wh.a"]].map(|names| layer(names, Compression::None));
    let packed = layer(&["a", "b"], Compression::Gzip);
    let ids = [Digest::of(&lower), Digest::of(&upper)];
    let made = |layers: &[(&str, &[u8])], ids: &[Digest]| SavedFiles::new().image("x:1", "amd64", layers, ids);

    let plain = made(&[("1/layer.tar", &lower), ("2/layer.tar", &upper)], &ids);
    assert_eq!(plain.imported().unwrap(), ["b", "c"]);
    let compressed = made(&[("blobs/sha256/x", &packed), ("2/layer.tar", &upper)], &ids);
    assert_eq!(compressed.imported().unwrap(), ["b", "c"]);
    fs::rename(plain.dir.path().join("1/layer.tar"), plain.dir.path().join("layer")).unwrap();
    std::os::unix::fs::symlink("../layer", plain.dir.path().join("1/layer.tar")).unwrap();
    assert_eq!(plain.imported().unwrap(), ["b", "c"]);

    let refused = |saved: &SavedFiles| saved.imported().unwrap_err().to_string();
    let exchanged = made(&[("1/layer.tar", &upper), ("2/layer.tar", &lower)], &ids);
    assert!(refused(&exchanged).starts_with("layer 1 of 2 does not have its digest"));
    assert!(
        refused(&made(&[("1/layer.tar", &lower)], &ids)).contains("names 1 layers, and the image's configuration 2")
    );
    fs::remove_file(plain.dir.path().join("layer")).unwrap();
    assert!(refused(&plain).contains("which the archive lacks"));
    let both = compressed.image("y:2", "amd64", &[], &[]);
    assert_eq!(refused(&both), "there is not one image to choose: it has x:1, y:2");
    let foreign = SavedFiles::new().image("x", "arm64", &[], &[]);
    assert_eq!(refused(&foreign), "there is no image for linux/amd64: it has linux/arm64");
    let config = foreign.items[0]["Config"].as_str().unwrap();
    foreign.file(config, b"{}");
    assert!(refused(&foreign).starts_with("the image's configuration does not have its digest"));
    let nothing = SavedFiles::new();
    nothing.file("other", b"");
    assert!(refused(&nothing).contains("has no manifest.json"));
    // A loop of links ends.
    let round = SavedFiles::new();
    std::os::unix::fs::symlink("manifest.json", round.dir.path().join("manifest.json")).unwrap();
    assert!(refused(&round).contains("has no manifest.json"));
}

#[test]
fn other_files_are_no_images() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    for contents in [&b""[..], b"text", &[0xff; 4096]] {
        fs::write(file.path(), contents).unwrap();
        let opened = Files::open(file.path(), 1 << 20);
        let refused = opened.and_then(|files| in_layout(&files, None, &Platform::host()).map(drop)).unwrap_err();
        assert!(matches!(refused, OciError::Malformed { .. }), "{refused:?}");
    }
    file.write_all(b"\xfd7zXZ\0").unwrap();
    let missing = Files::open(Path::new("/nonexistent"), 1).err().unwrap();
    assert!(matches!(missing, OciError::Read { .. }), "{missing:?}");
}

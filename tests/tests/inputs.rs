//! The inputs of a build: how they look, and that nothing changes them.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    os::unix::{
        ffi::OsStrExt,
        fs::{PermissionsExt, symlink},
    },
    path::PathBuf,
};

use cofferdam_tests::{Cofferdam, castore::NodeText, guest};

/// A directory with every kind of node that castore has.
fn tree(cofferdam: &Cofferdam) -> io::Result<PathBuf> {
    let tree = cofferdam.files().join("tree");
    fs::create_dir_all(tree.join("directory/empty"))?;
    cofferdam.file("tree/directory/file", "text\n");
    cofferdam.file("tree/empty-file", "");
    let program = cofferdam.file("tree/program", "#!/bin/sh\necho from a script\n");
    fs::set_permissions(program, PermissionsExt::from_mode(0o700))?;
    fs::write(tree.join(OsStr::from_bytes(b"not\xffutf8")), "odd")?;
    symlink("directory/file", tree.join("link"))?;
    symlink("/nowhere", tree.join("dangling"))?;
    Ok(tree)
}

#[test]
fn inputs_look_the_same_everywhere_and_cannot_be_written() {
    let cofferdam = Cofferdam::new();
    let tree = tree(&cofferdam).unwrap();
    let node = cofferdam.import(&tree);
    let before = cofferdam.verified_blobs();

    let built = cofferdam
        .build()
        .input_node("tree", &node)
        .output("build/copy")
        .output("build/facts")
        .output("build/refusals")
        .exported()
        .shell(
            "cd /inputs/tree
             for name in . directory directory/empty directory/file empty-file program not*utf8; do
                 stat -c '%A %u:%g %Y' $name
             done > /build/facts
             cat link >> /build/facts
             ./program >> /build/facts
             readlink dangling >> /build/facts
             for try in 'echo x >> directory/file' 'echo x > new' 'rm empty-file' 'mkdir d' 'chmod 777 program' \\
                        'ln -s x y' 'mv link link2' 'touch directory' 'rmdir directory/empty'; do
                 sh -c \"$try\" 2>/dev/null && echo \"$try succeeded\"
             done > /build/refusals
             cp -dR /inputs/tree /build/copy",
        )
        .succeeds();

    let (directory, file, program) = ("dr-xr-xr-x 0:0", "-r--r--r-- 0:0", "-r-xr-xr-x 0:0");
    let looks =
        [directory, directory, directory, file, file, program, file].map(|look| format!("{look} 315619200\n")).concat();
    assert_eq!(built.read("build/facts"), format!("{looks}text\nfrom a script\n/nowhere\n"), "{built}");
    assert_eq!(built.read("build/refusals"), "", "{built}");
    assert_eq!(built.outputs()[0].node, node, "a copy of the input is another tree: {built}");
    let in_nix_store = cofferdam.build().input_node("tree", &node).flag("--inputs-dir", "nix/store");
    in_nix_store.shell("[ $(stat -c %Y /nix/store/tree/program) = 1 ]").succeeds();

    let after = cofferdam.verified_blobs();
    assert!(before.iter().all(|blob| after.contains(blob)), "the store has lost blobs");
}

#[test]
fn overwritten_inputs_do_not_change_in_the_store() {
    let cofferdam = Cofferdam::new();
    let node = cofferdam.import(&tree(&cofferdam).unwrap());
    let plain = cofferdam.import(&cofferdam.file("plain", "as it was\n"));
    let before = cofferdam.verified_blobs();

    let overwritten = cofferdam
        .build()
        .input_node("plain", &plain)
        .input_node("tree", &node)
        .flag("--inputs-dir", "store")
        .flag("--scratch", "store")
        .output("store/new")
        .output("store/plain")
        .exported()
        .shell(
            "cd /store && echo beside > new && rm -f plain && echo changed > plain || exit 1
             # These are root's; whether any of it works is not the point here.
             exec 2>/dev/null
             chmod -R u+w tree
             echo changed > tree/directory/file; rm -f tree/empty-file; echo more >> tree/program
             mv tree/link tree/moved; mv tree tree2; rm -rf tree
             true",
        )
        .succeeds();
    assert_eq!(overwritten.read("store/new"), "beside\n");
    assert_eq!(overwritten.read("store/plain"), "changed\n");

    let after = cofferdam.verified_blobs();
    assert!(before.iter().all(|blob| after.contains(blob)), "the store has lost blobs");
    let build = cofferdam.build().input_node("plain", &plain).input_node("tree", &node);
    let build = build.output("build/copied-plain").output("build/copied-tree");
    let copied = build.shell("cp /inputs/plain copied-plain; cp -dR /inputs/tree copied-tree").succeeds();
    let nodes: Vec<_> = copied.outputs().into_iter().map(|output| output.node).collect();
    assert_eq!(nodes, [plain, node], "the next build sees other inputs: {copied}");
}

#[test]
fn inputs_can_be_the_root_and_commands_are_found_along_path() {
    let cofferdam = Cofferdam::new();
    let programs = cofferdam.files().join("bin");
    fs::create_dir(&programs).unwrap();
    fs::copy(guest::probe(), programs.join("probe")).unwrap();
    let data = cofferdam.file("data", "at the root");
    let built = cofferdam
        .build()
        .flag("--inputs-dir", "")
        .input("bin", &programs)
        .input("data", &data)
        .flag("--env", "PATH=/nowhere:/bin")
        .output("build/out")
        .exported()
        .run(["probe", "copy", "/data", "out"])
        .succeeds();
    assert_eq!(built.read("build/out"), "at the root");
}

#[test]
fn large_files_and_odd_names_are_read_correctly() {
    let cofferdam = Cofferdam::new();
    let mut block = vec![0; 1 << 20];
    let mut large = Vec::new();
    for number in 0..100_u32 {
        blake3::Hasher::new().update(&number.to_le_bytes()).finalize_xof().fill(&mut block);
        large.extend_from_slice(&block);
    }
    let large = cofferdam.import(&cofferdam.file("large", large));
    let mut odd = OsString::from(OsStr::from_bytes(b"odd \xfe\nname="));
    odd.push(cofferdam.file("odd", "found"));

    let built = cofferdam
        .build()
        .input_node("large", &large)
        .flag("--input", odd)
        .output("build/copy")
        .output("build/odd")
        .exported()
        .shell("cp /inputs/large copy; cat /inputs/odd* > odd")
        .succeeds();
    assert_eq!(built.outputs()[0].node, large, "{built}");
    assert_eq!(built.read("build/odd"), "found");
}

#[test]
fn a_machine_starts_before_its_inputs_have_arrived() {
    let cofferdam = Cofferdam::new();
    let remote = cofferdam.files().join("remote");
    let remote_addr = format!("objectstore+file://{}", remote.display());
    let [used, unused] = [vec![7; 3_000_000], vec![9; 3_000_000]];
    cofferdam.file("tree/used", &used);
    cofferdam.file("tree/unused", &unused);
    let tree = cofferdam.files().join("tree").into_os_string().into_string().unwrap();
    let import = ["import", &tree, "--blob-service-addr", &remote_addr, "--directory-service-addr", &remote_addr];
    let printed = cofferdam.command(import).succeeds();
    let node = NodeText::printed(printed.stdout.split_whitespace().next().unwrap());

    // A missing blob never arrives, so the build ran without waiting for it.
    let lost = blake3::hash(&unused[..512 * 1024]).to_hex();
    fs::remove_file(remote.join("chunks/b3").join(&lost[..4]).join(lost.as_str())).unwrap();
    let cache = cofferdam.files().join("cache");
    let cache_addr = format!("cache://{}?remote={remote_addr}", cache.display());
    let build = |script: &str| {
        let build = cofferdam.build().flag("--blob-service-addr", &cache_addr);
        let build = build.flag("--directory-service-addr", &cache_addr).input_node("tree", &node);
        build.output("build/copy").exported().shell(script)
    };
    let built = build("cp /inputs/tree/used /build/copy").succeeds();
    assert!(built.read_bytes("build/copy") == used, "{built}");
    let is_cached = |contents: &[u8]| {
        let hex = blake3::hash(contents).to_hex();
        cache.join("blobs/b3").join(&hex[..2]).join(hex.as_str()).exists()
    };
    assert!(is_cached(&used) && !is_cached(&unused));
    build("cp /inputs/tree/unused /build/copy").exits_with(3).says("is damaged: its chunk");
}

#[test]
fn a_scratch_path_over_an_input_is_a_writable_copy_throughout() {
    let cofferdam = Cofferdam::new();
    let tree = tree(&cofferdam).unwrap();
    let node = cofferdam.import(&tree);
    let before = cofferdam.verified_blobs();
    let built = cofferdam
        .build()
        .input_node("read-only", &node)
        .input_node("tree", &node)
        .flag("--scratch", "inputs/tree")
        .flag("--workdir", "inputs/tree")
        .output("inputs/tree")
        .output("build/facts")
        .exported()
        .shell(
            "set -e
             # Nothing is older than what was made of it, and nothing from before 1980.
             stat -c '%n %A %u:%g %Y' directory directory/file program > /build/facts
             stat -c %d . directory directory/file | sort -u | wc -l >> /build/facts
             before=$(stat -c %i directory directory/empty)
             echo more >> directory/file
             chmod 700 empty-file
             mv directory/empty directory/moved
             echo new > directory/moved/new
             rm program link dangling not*utf8
             touch -d @315619200 directory
             [ \"$before\" = \"$(stat -c %i directory directory/moved)\" ] || echo other inodes >> /build/facts
             stat -c '%A %u:%g' /inputs/read-only/directory/file >> /build/facts",
        )
        .succeeds();
    let facts = "directory drwxr-xr-x 1000:100 315619200\n\
                 directory/file -rw-r--r-- 1000:100 315619200\n\
                 program -rwxr-xr-x 1000:100 315619200\n\
                 1\n-r--r--r-- 0:0\n";
    assert_eq!(built.read("build/facts"), facts, "{built}");
    let changed = built.exported("inputs/tree").join("directory");
    assert_eq!(fs::read_to_string(changed.join("file")).unwrap(), "text\nmore\n", "{built}");
    assert_eq!(fs::read_to_string(changed.join("moved/new")).unwrap(), "new\n", "{built}");
    let after = cofferdam.verified_blobs();
    assert!(before.iter().all(|blob| after.contains(blob)), "the store has lost blobs");
    assert_eq!(cofferdam.import(&tree), node);
}

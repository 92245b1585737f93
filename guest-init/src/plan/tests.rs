use cofferdam_protocol::Secret;
use serde_bytes::ByteBuf;

use super::*;

/// Inputs with these entries.
fn inputs_with(entries: &[(&str, Kind)]) -> impl Fn(&Path) -> io::Result<Kind> + use<> {
    let entries: BTreeMap<PathBuf, Kind> = entries.iter().map(|(path, kind)| (path.into(), kind.clone())).collect();
    move |path| Ok(entries.get(path).cloned().unwrap_or(Kind::Missing))
}

fn link(target: &str) -> Kind {
    Kind::Symlink(target.into())
}

fn specification(inputs_dir: &str, scratch_paths: &[&str]) -> Specification {
    Specification {
        command_args: vec!["true".to_owned()],
        environment: Vec::new(),
        working_dir: String::new(),
        inputs_dir: inputs_dir.to_owned(),
        scratch_paths: scratch_paths.iter().map(|path| (*path).to_owned()).collect(),
        additional_files: Vec::new(),
        outputs: Vec::new(),
        provide_bin_sh: false,
        host_paths: Vec::new(),
        network: false,
        kvm: false,
        processes: 1,
        user_namespaces: false,
        ca_file: None,
        secrets: Vec::new(),
        unix_time_ns: 0,
        terminal: None,
    }
}

/// Whether a mount is writable, and its lower layer; `None` unless it has layers.
type Layers = Option<(bool, Option<String>)>;

/// Each mount's path and layers.
fn mounts(plan: &Plan<'_>) -> Vec<(String, Layers)> {
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let content = |content: &Content| match content {
        Content::Layers { writable, lower, .. } => Some((*writable, lower.as_deref().map(text))),
        Content::Devices | Content::Proc | Content::Sys | Content::Secrets | Content::HostPath { .. } => None,
    };
    plan.mounts.iter().map(|mount| (text(&mount.at), content(&mount.content))).collect()
}

/// The innermost mount around a path, and whether it is writable.
fn mount_of(plan: &Plan<'_>, path: &str) -> (String, bool) {
    let (index, _) = plan.innermost(Path::new(path)).unwrap();
    let Content::Layers { writable, .. } = plan.mounts[index].content else { panic!("{path} is reserved") };
    (plan.mounts[index].at.to_str().unwrap().to_owned(), writable)
}

fn owners(plan: &Plan<'_>, path: &str) -> Vec<Owner> {
    let at = |directory: &Directory| plan.mounts[directory.mount].at.join(&directory.path);
    plan.directories.iter().filter(|directory| at(directory) == Path::new(path)).map(|d| d.owner).collect()
}

#[test]
fn a_nix_build_gets_an_overlay_and_a_scratch_directory() {
    let specification = specification("nix/store", &["build", "nix/store"]);
    let plan = Plan::new(&specification, &inputs_with(&[])).unwrap();
    let layers = |writable, lower: Option<&str>| Some((writable, lower.map(str::to_owned)));
    let expected = [
        ("", layers(false, None)),
        ("build", layers(true, None)),
        ("dev", None),
        ("nix/store", layers(true, Some(""))),
        ("proc", None),
        ("sys", None),
        ("tmp", layers(true, None)),
    ];
    assert_eq!(mounts(&plan), expected.map(|(at, content)| (at.to_owned(), content)));
    assert_eq!(owners(&plan, "nix/store"), [Owner::Root]);
}

#[test]
fn inputs_at_the_root_are_read_only_except_for_scratch_paths() {
    let specification = specification("", &["build"]);
    let inputs = inputs_with(&[("usr", Kind::Directory), ("build", Kind::Directory)]);
    let plan = Plan::new(&specification, &inputs).unwrap();
    assert_eq!(mounts(&plan)[0], (String::new(), Some((false, Some(String::new())))));
    assert_eq!(mounts(&plan)[1], ("build".to_owned(), Some((true, Some("build".to_owned())))));
    assert_eq!(mount_of(&plan, "usr"), (String::new(), false));
}

#[test]
fn a_writable_root_needs_no_further_scratch_mounts() {
    let specification = specification("", &["", "build/deep"]);
    let plan = Plan::new(&specification, &inputs_with(&[("build", Kind::Directory)])).unwrap();
    let paths: Vec<_> = mounts(&plan).into_iter().map(|(at, _)| at).collect();
    assert_eq!(paths, ["", "dev", "proc", "sys"]);
    assert_eq!(owners(&plan, "build/deep"), [Owner::Build]);
    let tmp = plan.directories.iter().find(|directory| directory.path == Path::new("tmp")).unwrap();
    assert!(tmp.shared);
}

#[test]
fn every_nesting_of_scratch_paths_and_inputs_is_mounted_right() {
    const PATHS: [&str; 6] = ["", "a", "a/b", "a/b/c", "a/x", "y"];
    let inputs = inputs_with(&[
        ("a", Kind::Directory),
        ("a/b", Kind::Directory),
        ("b", Kind::Directory),
        ("b/c", Kind::Directory),
        ("x", Kind::Directory),
    ]);
    for inputs_dir in PATHS {
        for choice in 0..1 << PATHS.len() {
            let scratch: Vec<_> = (0..PATHS.len()).filter(|n| choice >> n & 1 == 1).map(|n| PATHS[n]).collect();
            let specification = specification(inputs_dir, &scratch);
            let plan = Plan::new(&specification, &inputs).unwrap();
            let case = format!("inputs_dir {inputs_dir:?}, scratch {scratch:?}: {:?}", mounts(&plan));
            check_mounts(&plan, inputs_dir, &scratch, &PATHS, &case);
        }
    }
}

fn check_mounts(plan: &Plan<'_>, inputs_dir: &str, scratch: &[&str], paths: &[&str], case: &str) {
    // Every mount point is made in an earlier mount.
    for (index, mount) in plan.mounts.iter().enumerate().skip(1) {
        let made = |directory: &Directory| plan.mounts[directory.mount].at.join(&directory.path) == mount.at;
        let mount_point = plan.directories.iter().find(|directory| made(directory)).expect(case);
        assert!(mount_point.mount < index, "{case}");
    }
    // The inputs are the lower layer at their mount point.
    let at_inputs = plan.mounts.iter().find(|mount| mount.at == Path::new(inputs_dir)).expect(case);
    assert!(
        matches!(&at_inputs.content, Content::Layers { lower: Some(lower), .. } if lower.as_os_str().is_empty()),
        "{case}"
    );
    for path in paths {
        let (at, writable) = mount_of(plan, path);
        // A path is writable if a scratch path is at or above it, unless inputs_dir is in between.
        let innermost_scratch = scratch.iter().filter(|scratch| Path::new(path).starts_with(scratch)).max();
        let inputs_begin = Path::new(path).starts_with(inputs_dir);
        let expected = innermost_scratch.is_some_and(|scratch| !inputs_begin || *scratch >= inputs_dir);
        assert_eq!(writable, expected, "{path:?} in {case}");
        // A scratch path that is no mount point is a directory of the build's.
        if scratch.contains(path) && at != *path {
            assert_eq!(owners(plan, path), [Owner::Build], "{path:?} in {case}");
        }
    }
}

#[test]
fn symlinks_of_the_inputs_are_followed_within_the_root() {
    let inputs = inputs_with(&[
        ("bin", link("usr/bin")),
        ("usr", Kind::Directory),
        ("usr/bin", Kind::Directory),
        ("tmp", link("../../var/tmp")),
        ("work", link("/srv/./work")),
    ]);
    let mut specification = specification("", &["work"]);
    specification.provide_bin_sh = true;
    specification.additional_files = vec![("work/file".to_owned(), ByteBuf::new())];
    let plan = Plan::new(&specification, &inputs).unwrap();
    let paths: Vec<_> = mounts(&plan).into_iter().map(|(at, _)| at).collect();
    assert_eq!(paths, ["", "dev", "proc", "srv/work", "sys", "var/tmp"]);
    let shell = plan.files.iter().find(|file| file.source == Source::Shell).unwrap();
    assert_eq!((shell.mount, shell.path.as_path()), (0, Path::new("usr/bin/sh")));
    assert_eq!((plan.files[0].mount, plan.files[0].path.as_path()), (3, Path::new("file")));
    assert_eq!(plan.files[0].owner, Owner::Build);
}

#[test]
fn files_of_the_inputs_take_precedence_over_default_files() {
    let inputs = inputs_with(&[
        ("etc", Kind::Directory),
        ("etc/passwd", Kind::File),
        ("bin", Kind::Directory),
        ("bin/sh", link("dash")),
        ("bin/dash", Kind::File),
    ]);
    let mut specification = specification("", &[]);
    specification.provide_bin_sh = true;
    let plan = Plan::new(&specification, &inputs).unwrap();
    let names: Vec<_> = plan.files.iter().map(|file| file.path.to_str().unwrap()).collect();
    assert_eq!(names, ["etc/group", "etc/hosts"]);
}

#[test]
fn a_shell_that_can_not_be_made_is_refused() {
    for (inputs, errno) in [
        (inputs_with(&[("bin", Kind::File)]), libc::ENOTDIR),
        (inputs_with(&[("bin", Kind::Directory), ("bin/sh", Kind::Directory)]), libc::EISDIR),
        (inputs_with(&[("bin", link("bin"))]), libc::ELOOP),
    ] {
        let mut specification = specification("", &[]);
        assert!(Plan::new(&specification, &inputs).is_ok());
        specification.provide_bin_sh = true;
        let error = Plan::new(&specification, &inputs).unwrap_err();
        assert_eq!((error.step, error.source.raw_os_error()), (Step::Places, Some(errno)));
        assert!(error.to_string().contains("/bin/sh"), "{error}");
    }
}

#[test]
fn unreadable_inputs_are_not_the_requests_fault() {
    let specification = specification("in", &["in/scratch"]);
    let unreadable = |_: &Path| Err(io::Error::from_raw_os_error(libc::EIO));
    assert_eq!(Plan::new(&specification, &unreadable).unwrap_err().step, Step::Inputs);
}

#[test]
fn certificates_of_the_host_replace_those_of_the_inputs_and_not_those_of_the_request() {
    let kinds = [("etc", Kind::Directory), ("etc/ssl", Kind::Directory), ("etc/ssl/certs", Kind::Directory)];
    for inputs in
        [inputs_with(&[]), inputs_with(&[&kinds[..], &[("etc/ssl/certs/ca-certificates.crt", Kind::File)]].concat())]
    {
        let mut specification = specification("", &[]);
        specification.ca_file = Some(ByteBuf::from("PEM"));
        let plan = Plan::new(&specification, &inputs).unwrap();
        let contents = |plan: &Plan<'_>| {
            let file = plan.files.iter().find(|file| file.path == Path::new(CA_FILE)).unwrap();
            let (Source::Request { contents, .. } | Source::Default(contents)) = file.source else {
                panic!("{file:?}")
            };
            contents.to_vec()
        };
        assert_eq!(contents(&plan), b"PEM");
        specification.additional_files = vec![(CA_FILE.to_owned(), ByteBuf::from("the request's"))];
        assert_eq!(contents(&Plan::new(&specification, &inputs).unwrap()), b"the request's");
    }
    // No build fails because of them.
    let mut specification = specification("", &[]);
    specification.ca_file = Some(ByteBuf::from("PEM"));
    Plan::new(&specification, &inputs_with(&[("etc", Kind::File)])).unwrap();
}

#[test]
fn a_symlink_loop_ends() {
    let inputs = inputs_with(&[("loop", link("loop"))]);
    let specification = specification("", &["loop/x"]);
    let error = Plan::new(&specification, &inputs).unwrap_err();
    assert_eq!((error.step, error.source.raw_os_error()), (Step::Places, Some(libc::ELOOP)));
}

#[test]
fn files_in_the_way_are_named() {
    let inputs = inputs_with(&[("file", Kind::File), ("d", Kind::Directory)]);
    for scratch in ["in/file", "in/file/below"] {
        let specification = specification("in", &[scratch]);
        let error = Plan::new(&specification, &inputs).unwrap_err();
        assert_eq!((error.step, error.source.raw_os_error()), (Step::Places, Some(libc::ENOTDIR)));
        assert!(error.to_string().contains(&format!("scratch path {scratch:?}")), "{error}");
    }
    for (name, errno) in [("in/file/below", libc::ENOTDIR), ("in/d", libc::EISDIR), ("dev/x", libc::EBUSY)] {
        let mut specification = specification("in", &[]);
        specification.additional_files = vec![(name.to_owned(), ByteBuf::new())];
        let error = Plan::new(&specification, &inputs).unwrap_err();
        assert_eq!((error.step, error.source.raw_os_error()), (Step::AdditionalFiles, Some(errno)));
        assert!(error.to_string().contains(&format!("{name:?}")), "{error}");
    }
}

#[test]
fn reserved_directories_are_refused() {
    for (inputs_dir, scratch) in [("dev", "build"), ("proc/x", "build"), ("in", "proc"), ("in", "dev/shm")] {
        let specification = specification(inputs_dir, &[scratch]);
        let error = Plan::new(&specification, &inputs_with(&[])).unwrap_err();
        assert_eq!((error.step, error.source.raw_os_error()), (Step::Places, Some(libc::EBUSY)));
    }
}

#[test]
fn a_working_directory_is_made_below_scratch_only() {
    for (working_dir, expected) in [("build/deep/er", vec![Owner::Build]), ("in/d/new", vec![]), ("elsewhere", vec![])]
    {
        let mut specification = specification("in", &["build"]);
        specification.working_dir = working_dir.to_owned();
        let plan = Plan::new(&specification, &inputs_with(&[("d", Kind::Directory)])).unwrap();
        assert_eq!(owners(&plan, working_dir), expected, "{working_dir}");
    }
}

#[test]
fn inputs_with_an_empty_upper_layer_need_no_overlay() {
    let mut specification = specification("in", &["build"]);
    let bare = |specification: &Specification| {
        let plan = Plan::new(specification, &inputs_with(&[])).unwrap();
        plan.has_empty_upper(plan.innermost(Path::new("in")).unwrap().0)
    };
    assert!(bare(&specification));
    specification.additional_files = vec![("in/new".to_owned(), ByteBuf::new())];
    assert!(!bare(&specification));
}

fn with_host_paths(paths: &[(&str, bool)]) -> Specification {
    let host_paths =
        paths.iter().map(|(path, is_directory)| HostPath { path: (*path).to_owned(), is_directory: *is_directory });
    Specification { host_paths: host_paths.collect(), ..specification("in", &["build"]) }
}

#[test]
fn host_paths_are_mounted_where_the_request_has_nothing() {
    let specification = with_host_paths(&[("opt/data", true), ("in/lib/key", false), ("build/data", true)]);
    let plan = Plan::new(&specification, &inputs_with(&[("lib", Kind::Directory)])).unwrap();
    let mount = |path: &str| plan.mounts.iter().find(|mount| mount.at == Path::new(path)).map(|mount| &mount.content);
    assert_eq!(mount("opt/data"), Some(&Content::HostPath { number: 0, is_directory: true }));
    assert_eq!(mount("in/lib/key"), Some(&Content::HostPath { number: 1, is_directory: false }));
    assert_eq!(mount("build/data"), Some(&Content::HostPath { number: 2, is_directory: true }));
    assert_eq!((owners(&plan, "opt/data").len(), owners(&plan, "in/lib/key").len()), (1, 0));
    let file = plan.files.iter().find(|file| file.path == Path::new("lib/key")).unwrap();
    assert_eq!((file.source, plan.mounts[file.mount].at.as_path()), (Source::Default(b""), Path::new("in")));
}

#[test]
fn host_paths_never_hide_anything() {
    for path in ["", "in", "build", "proc", "dev", "dev/kvm", "proc/self", "tmp", "in/file", "opt/a/b"] {
        let specification = with_host_paths(&[("opt/a", true), (path, true)]);
        let error = Plan::new(&specification, &inputs_with(&[("file", Kind::File)])).unwrap_err();
        assert_eq!(error.step, Step::Places, "{path}");
    }
}

#[test]
fn secrets_have_a_directory_that_nothing_else_can_use() {
    let secret = Secret { name: "token".to_owned(), contents: ByteBuf::from(*b"s") };
    let with = |inputs_dir: &str, scratch: &str| Specification {
        secrets: vec![secret.clone()],
        ..specification(inputs_dir, &[scratch])
    };
    for (inputs_dir, scratch, entries) in [
        ("in", "build", vec![]),
        ("", "build", vec![("run", Kind::Directory), ("run/secrets", Kind::Directory)]),
        ("in", "run", vec![]),
    ] {
        let specification = with(inputs_dir, scratch);
        let plan = Plan::new(&specification, &inputs_with(&entries)).unwrap();
        assert_eq!(plan.mount_point(&Content::Secrets), Some(Path::new("run/secrets")), "{inputs_dir:?} {scratch}");
    }
    for (inputs_dir, scratch) in [("run/secrets", "build"), ("in", "run/secrets"), ("in", "run/secrets/token")] {
        let specification = with(inputs_dir, scratch);
        let error = Plan::new(&specification, &inputs_with(&[])).unwrap_err();
        assert_eq!((error.step, error.source.raw_os_error()), (Step::Places, Some(libc::EBUSY)));
    }
    let plan_of = specification("in", &["run/secrets"]);
    assert!(Plan::new(&plan_of, &inputs_with(&[])).is_ok(), "without secrets, the path is a path like any other");
}

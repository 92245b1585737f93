//! `run --source`: a project of this host, built in a machine.

use std::{fs, os::unix::net::UnixListener, path::PathBuf};

use cofferdam_tests::Cofferdam;

/// A small project, some of which git ignores.
fn project(cofferdam: &Cofferdam) -> PathBuf {
    for directory in ["project/sub", "project/target"] {
        fs::create_dir_all(cofferdam.files().join(directory)).expect("the directory can be made");
    }
    cofferdam.file("project/.gitignore", "target\n");
    cofferdam.file("project/target/old", "of an earlier build");
    cofferdam.file("project/sub/text", "text\n");
    cofferdam.files().join("project")
}

#[test]
fn a_source_tree_is_where_the_command_starts_and_the_builds_own() {
    let cofferdam = Cofferdam::new();
    let project = project(&cofferdam);
    let built = cofferdam
        .build()
        .flag("--source", &project)
        .switch("--gitignore")
        .input("data", &cofferdam.file("data", "data\n"))
        .output("build/made")
        .exported()
        .shell(
            "set -e
             [ ! -e target ]
             echo more >> sub/text
             cat sub/text /inputs/data > made
             stat -c '%U %A' sub sub/text >> made
             rm -r sub",
        )
        .succeeds();
    assert_eq!(built.read("build/made"), "text\nmore\ndata\nnixbld drwxr-xr-x\nnixbld -rw-r--r--\n", "{built}");
    assert_eq!(fs::read_to_string(project.join("sub/text")).unwrap(), "text\n");
    let elsewhere = cofferdam.build().flag("--source", &project).flag("--workdir", "usr/src/project");
    elsewhere.shell("[ $(pwd) = /usr/src/project ] && cat target/old && rm -r target").succeeds();
}

#[test]
fn a_source_tree_that_can_not_be_copied_is_refused_before_anything_boots() {
    let cofferdam = Cofferdam::new();
    let project = project(&cofferdam);
    let _listener = UnixListener::bind(project.join("sub/socket")).unwrap();
    let refused = cofferdam.build().flag("--source", &project).shell("true");
    refused.is_refused("command_line").says("sub/socket is a socket");
    let refused = cofferdam.build().flag("--source", project.join("sub/text")).shell("true");
    refused.is_refused("command_line").says("is no directory");
    assert_eq!(cofferdam.leftovers(), Vec::<PathBuf>::new());
}

//! `doctor`: what this host can do, what is missing, and how to fix it.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use cofferdam::machine::vmm::Accelerator;
use cofferdam_tests::{Cofferdam, vmm};

#[test]
fn doctor_says_that_a_host_can_build() {
    let cofferdam = Cofferdam::new();
    let told = cofferdam.command(["doctor"]).succeeds();
    assert!(told.stdout.contains("builds can run here"), "{told}");
    for name in ["kvm", "qemu", "cloud-hypervisor", "guest image", "store"] {
        assert!(told.stdout.contains(name), "it says nothing about {name}: {told}");
    }
    let json = cofferdam.command(["doctor", "--json"]).succeeds().json();
    assert_eq!(json["can_build"], true);
    // Its checks of a daemon agree with those at a daemon's start.
    let checks = json["checks"].as_array().unwrap();
    let daemon = checks.iter().find(|check| check["name"] == "daemon").unwrap();
    let file = cofferdam.file("daemon.toml", "");
    let started =
        cofferdam.command(["daemon".as_ref(), "--check-config".as_ref(), "--config".as_ref(), file.as_os_str()]);
    if vmm::choice().accelerator == Accelerator::Tcg {
        started.exits_with(3).says("could only be emulated");
        assert_eq!(daemon["state"], "absent", "{daemon}");
        assert!(daemon["detail"].as_str().unwrap().contains("could only be emulated"), "{daemon}");
        assert!(daemon["fix"].as_str().unwrap().contains("--allow-emulation"), "{daemon}");
    } else {
        started.succeeds();
        assert_eq!(daemon["state"], "ok", "{daemon}");
    }
}

#[test]
fn missing_parts_are_reported_with_a_fix() {
    let cofferdam = Cofferdam::with_image("/nowhere/image");
    let told = cofferdam.command(["doctor", "--json"]).exits_with(3);
    let json = told.json();
    assert_eq!(json["can_build"], false, "{told}");
    let checks = json["checks"].as_array().unwrap();
    let image = checks.iter().find(|check| check["name"] == "guest image").unwrap();
    assert_eq!(image["state"], "missing", "{told}");
    assert!(image["detail"].as_str().unwrap().contains("/nowhere/image/kernel"), "{told}");
    assert!(image["fix"].as_str().unwrap().contains("just image"), "{told}");
}

#[test]
fn an_unusable_cloud_hypervisor_is_reported_with_path_output_and_fix() {
    let cofferdam = Cofferdam::new();
    let place = |name: &str, script: &str, mode| {
        let path = cofferdam.file(&format!("{name}/cloud-hypervisor"), format!("#!/bin/sh\n{script}\n"));
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        path
    };
    for (file, words, next) in [
        (place("other", "echo 'another program 3'", 0o755), "is not cloud-hypervisor", "name another file in"),
        (place("broken", "echo 'no libc' >&2; exit 127", 0o755), "the output \"no libc\"", "name another file in"),
        (place("old", "echo cloud-hypervisor v38.0", 0o755), "the oldest that works is 39.0", "install v53"),
        (place("forbidden", "echo cloud-hypervisor v53.0", 0o644), "not executable", "chmod a+x"),
    ] {
        let path = file.parent().unwrap();
        // Named by the setting, and found in PATH without the setting.
        for (named, path) in [(file.as_path(), Path::new("")), (Path::new(""), path)] {
            // The exit code doesn't matter: it reports QEMU, which is not in this PATH.
            let variables = [("COFFERDAM_CLOUD_HYPERVISOR", named), ("PATH", path)];
            let told = cofferdam.command_with(&variables, ["doctor", "--json"]);
            let json = told.json();
            let checks = json["checks"].as_array().unwrap();
            let check = checks.iter().find(|check| check["name"] == "cloud-hypervisor").unwrap();
            assert_eq!(check["state"], "absent", "{told}");
            let says = |key: &str, text: &str| assert!(check[key].as_str().unwrap().contains(text), "{text}: {told}");
            says("detail", file.to_str().unwrap());
            says("detail", words);
            says("fix", next);
        }
    }
    let variable = ("COFFERDAM_CLOUD_HYPERVISOR", Path::new("/nowhere/cloud-hypervisor"));
    let refused = cofferdam.command_with(&[variable], ["run", "--vmm", "cloud-hypervisor", "--", "/bin/true"]);
    refused.exits_with(3).says("names /nowhere/cloud-hypervisor, which is not a file").says("or unset it");
}

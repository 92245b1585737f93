//! What a host can do and lacks, with the step that mends it.

use cofferdam_tests::Cofferdam;

#[test]
fn a_host_that_can_build_is_told_so() {
    let cofferdam = Cofferdam::new();
    let told = cofferdam.command(["doctor"]).succeeds();
    assert!(told.stdout.contains("builds can run here"), "{told}");
    for name in ["kvm", "qemu", "cloud-hypervisor", "guest image", "store"] {
        assert!(told.stdout.contains(name), "it says nothing about {name}: {told}");
    }
    let json = cofferdam.command(["doctor", "--json"]).succeeds().json();
    assert_eq!(json["can_build"], true);
}

#[test]
fn what_is_missing_is_told_with_what_mends_it() {
    let cofferdam = Cofferdam::with_image("/nowhere/image");
    let told = cofferdam.command(["doctor", "--json"]).exits_with(3);
    let json = told.json();
    assert_eq!(json["can_build"], false, "{told}");
    let checks = json["checks"].as_array().unwrap();
    let image = checks.iter().find(|check| check["name"] == "guest image").unwrap();
    assert_eq!(image["state"], "missing", "{told}");
    assert!(image["detail"].as_str().unwrap().contains("/nowhere/image/kernel"), "{told}");
    assert!(image["mend"].as_str().unwrap().contains("just image"), "{told}");
}

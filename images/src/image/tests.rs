use super::*;

#[test]
fn a_missing_file_is_reported_with_the_command_that_makes_it() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join(KERNEL), "").unwrap();
    let error = Image::open(directory.path()).unwrap_err().to_string();
    assert!(error.contains("initramfs") && error.contains("just image"), "{error}");
}

/// Fills an image's files with `contents`.
fn fill(contents: &str) -> impl FnOnce(&Path) -> Result<(), EnsureError> {
    move |directory| {
        for name in FILES {
            fs::write(directory.join(name), contents).unwrap();
        }
        Ok(())
    }
}

fn contents(image: &Image) -> [String; 3] {
    [&image.kernel, &image.initramfs, &image.scratch].map(|path| fs::read_to_string(path).unwrap())
}

fn versions(out: &Path) -> usize {
    fs::read_dir(out.with_added_extension("versions")).unwrap().count()
}

#[test]
fn an_open_image_stays_unchanged_and_is_deleted_after_use() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("image");
    install(&out, fill("first")).unwrap();
    let first = Image::open(&out).unwrap();
    let clone = first.clone();
    drop(first);
    install(&out, fill("second")).unwrap();
    assert_eq!(contents(&clone), ["first"; 3]);
    assert_eq!(contents(&Image::open(&out).unwrap()), ["second"; 3]);
    assert_eq!(versions(&out), 2);
    drop(clone);
    install(&out, fill("third")).unwrap();
    assert_eq!(contents(&Image::open(&out).unwrap()), ["third"; 3]);
    assert_eq!(versions(&out), 1);
}

#[test]
fn an_image_opened_during_a_replacement_is_consistent() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("image");
    let link = directory.path().join("link");
    install(&out, fill("first")).unwrap();
    symlink("image", &link).unwrap();
    std::thread::scope(|scope| {
        let replacing = scope.spawn(|| (0..300).for_each(|n| install(&out, fill(&n.to_string())).unwrap()));
        while !replacing.is_finished() {
            let [kernel, initramfs, scratch] = contents(&Image::open(&link.join("")).unwrap());
            assert!(kernel == initramfs && kernel == scratch, "{kernel} {initramfs} {scratch}");
        }
    });
}

#[test]
fn unversioned_images_and_empty_directories_are_replaced() {
    let directory = tempfile::tempdir().unwrap();
    for earlier in [None, Some("earlier")] {
        let out = directory.path().join(earlier.unwrap_or("empty"));
        fs::create_dir(&out).unwrap();
        if let Some(contents) = earlier {
            fill(contents)(&out).unwrap();
            assert_eq!(self::contents(&Image::open(&out).unwrap()), [contents; 3]);
        }
        check_replaceable(&out).unwrap();
        install(&out, fill("new")).unwrap();
        assert_eq!(contents(&Image::open(&out).unwrap()), ["new"; 3]);
        assert_eq!(versions(&out), 1);
    }
}

#[test]
fn foreign_files_are_neither_replaced_nor_deleted() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    let with_others = directory.path().join("an image and more");
    let without_marker = directory.path().join("without made-from");
    fs::write(&file, "").unwrap();
    for (path, name) in [(&with_others, "notes"), (&without_marker, KERNEL)] {
        fs::create_dir(path).unwrap();
        fs::write(path.join(name), "").unwrap();
    }
    fill("")(&with_others).unwrap();
    for out in [&file, &with_others, &without_marker, &directory.path().to_owned()] {
        let error = ensure(&Options { out: out.clone(), ..Options::default() }).unwrap_err();
        assert!(matches!(&error, EnsureError::Foreign { path } if path == out), "{error}");
        assert!(error.to_string().contains("--out"), "{error}");
        delete(out).unwrap_err();
    }
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 3);
    assert_eq!(fs::read_dir(with_others).unwrap().count(), 5);
    assert_eq!(fs::read_dir(without_marker).unwrap().count(), 1);
}

#[test]
fn a_new_version_leaves_other_directories_alone() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("image");
    let foreign = directory.path().join("image.versions/foreign");
    fs::create_dir_all(&foreign).unwrap();
    fs::write(foreign.join(KERNEL), "").unwrap();
    install(&out, fill("new")).unwrap();
    assert!(foreign.join(KERNEL).exists());
}

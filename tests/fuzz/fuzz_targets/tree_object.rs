//! Fuzzes the decoder of a stored tree of directories.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::castore::tree_object(bytes);
});

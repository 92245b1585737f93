//! Fuzzes the decoders of an image's documents and of a registry's challenge.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::host::image_document(bytes);
});

// Which OpenSSL this process would speak TLS with, for those who ask before they need it.
public import Block
import COpenSSL

/// The library that TLS comes from. It is loaded when somebody asks or TLS is used.
public enum TLSLibrary {
    /// Its version in words: OpenSSL 3.0.17 1 Jul 2025.
    ///
    /// - Returns: `.unsupported` with the reason where OpenSSL 3 cannot be loaded.
    public static func version() -> Result<String, BlockError> {
        if let problem = dg_tls_load() {
            return .failure(BlockError(.unsupported, "OpenSSL 3 cannot be loaded: \(String(cString: problem))"))
        }
        return .success(dg_tls_library_version().map { String(cString: $0) } ?? "OpenSSL 3")
    }
}

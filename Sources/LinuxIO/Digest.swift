// Digests by OpenSSL's libcrypto, loaded when the first one is made: a server that hashes nothing does not pay for it.
public import Block
import Glibc

/// The functions of libcrypto that digests need (EVP_DigestInit(3)).
private struct DigestLibrary: @unchecked Sendable {
    // Sendable because the library stays loaded and its functions may be called from every thread.
    typealias Make = @convention(c) () -> OpaquePointer?
    typealias Free = @convention(c) (OpaquePointer?) -> Void
    typealias ByName = @convention(c) (UnsafePointer<CChar>) -> OpaquePointer?
    typealias Start = @convention(c) (OpaquePointer, OpaquePointer, OpaquePointer?) -> Int32
    typealias Update = @convention(c) (OpaquePointer, UnsafeRawPointer?, Int) -> Int32
    typealias Finish =
        @convention(c) (OpaquePointer, UnsafeMutablePointer<UInt8>, UnsafeMutablePointer<UInt32>) -> Int32

    let make: Make
    let free: Free
    let byName: ByName
    let start: Start
    let update: Update
    let finish: Finish

    static let loaded: DigestLibrary? = DigestLibrary()

    private init?() {
        guard let library = dlopen("libcrypto.so.3", RTLD_NOW) else { return nil }
        guard let make = dlsym(library, "EVP_MD_CTX_new"), let free = dlsym(library, "EVP_MD_CTX_free"),
            let byName = dlsym(library, "EVP_get_digestbyname"), let start = dlsym(library, "EVP_DigestInit_ex"),
            let update = dlsym(library, "EVP_DigestUpdate"), let finish = dlsym(library, "EVP_DigestFinal_ex")
        else { return nil }
        self.make = unsafeBitCast(make, to: Make.self)
        self.free = unsafeBitCast(free, to: Free.self)
        self.byName = unsafeBitCast(byName, to: ByName.self)
        self.start = unsafeBitCast(start, to: Start.self)
        self.update = unsafeBitCast(update, to: Update.self)
        self.finish = unsafeBitCast(finish, to: Finish.self)
    }
}

/// A digest that is being computed.
public struct Digest: ~Copyable {
    private let library: DigestLibrary
    private let context: OpaquePointer
    private let algorithm: String

    /// Starts a digest by the name OpenSSL has for it.
    ///
    /// - Throws: `.unsupported` when libcrypto.so.3 cannot be loaded or does not know the algorithm.
    public init(_ algorithm: String) throws(BlockError) {
        guard let library = DigestLibrary.loaded else {
            throw BlockError(.unsupported, "computing \(algorithm): libcrypto.so.3 cannot be loaded (install libssl3)")
        }
        guard let method = library.byName(algorithm) else {
            throw BlockError(.unsupported, "computing \(algorithm): OpenSSL knows no such digest")
        }
        guard let context = library.make() else { throw BlockError(.noMemory, "computing \(algorithm)") }
        guard library.start(context, method, nil) == 1 else {
            library.free(context)
            throw BlockError(.unsupported, "computing \(algorithm): OpenSSL refuses to start it")
        }
        self.library = library
        self.context = context
        self.algorithm = algorithm
    }

    deinit { library.free(context) }

    /// Adds bytes.
    public mutating func update(_ bytes: UnsafeRawBufferPointer) throws(BlockError) {
        guard library.update(context, bytes.baseAddress, bytes.count) == 1 else {
            throw BlockError(.inputOutput, "computing \(algorithm): OpenSSL failed")
        }
    }

    /// The digest in hexadecimal. Nothing can be added afterwards.
    public mutating func finish() throws(BlockError) -> String {
        // EVP_MAX_MD_SIZE is 64.
        var bytes = [UInt8](repeating: 0, count: 64)
        var count: UInt32 = 0
        guard library.finish(context, &bytes, &count) == 1, count <= 64 else {
            throw BlockError(.unsupported, "computing \(algorithm): OpenSSL gives no digest of a fixed length")
        }
        return bytes[..<Int(count)].map { ($0 < 16 ? "0" : "") + String($0, radix: 16) }.joined()
    }
}

import Foundation

/// A question that is being written.
public struct Draft: Sendable {
    public var text = ""
    public private(set) var pictures: [Picture] = []
    /// Why the last file is not among the pictures.
    public private(set) var problem: String?

    public init() {}

    /// Whether there is something to ask.
    public var isReady: Bool {
        !text.allSatisfy(\.isWhitespace)
    }

    /// Reads pictures; what cannot be read is told, and the others are taken.
    public mutating func add(_ files: [URL]) {
        problem = nil
        for file in files {
            #if canImport(Darwin)
                // A sandboxed app may read a chosen file only between these.
                let isScoped = file.startAccessingSecurityScopedResource()
                defer { if isScoped { file.stopAccessingSecurityScopedResource() } }
            #endif
            do {
                pictures.append(try Picture(contentsOf: file))
            } catch {
                problem = "\(file.lastPathComponent) cannot be read: \(error.localizedDescription)"
            }
        }
    }

    public mutating func remove(at index: Int) {
        pictures.remove(at: index)
    }

    /// The question, which leaves an empty draft.
    public mutating func take() -> (text: String, pictures: [Picture]) {
        defer { self = Draft() }
        return (text, pictures)
    }
}

import Foundation

/// A picture as its file holds it: PNG, JPEG, or another format that the server reads.
public struct Picture: Sendable, Hashable {
    /// How closely a picture is looked at; `mm1` of ``MM1Client/models()`` says in how many tiles.
    public enum Detail: String, Sendable, Codable {
        case low, auto, high
    }

    /// The file's bytes.
    public var data: Data
    public var detail: Detail

    public init(_ data: Data, detail: Detail = .auto) {
        self.data = data
        self.detail = detail
    }

    /// The picture in a file.
    ///
    /// - Throws: Foundation's error if it cannot be read.
    public init(contentsOf url: URL, detail: Detail = .auto) throws {
        self.init(try Data(contentsOf: url), detail: detail)
    }
}

/// What somebody says and shows, in the order in which it stands.
public struct Message: Sendable, Hashable {
    public enum Role: String, Sendable, Codable {
        case system, user, assistant
    }

    public enum Part: Sendable, Hashable {
        case text(String)
        case picture(Picture)
    }

    public var role: Role
    public var parts: [Part]

    public init(_ role: Role, _ parts: [Part]) {
        self.role = role
        self.parts = parts
    }

    /// A question: pictures first, as MM1 was trained.
    public static func user(_ text: String, _ pictures: [Picture] = []) -> Message {
        Message(.user, pictures.map(Part.picture) + [.text(text)])
    }

    /// What the model answered before, or an example of what it should.
    public static func assistant(_ text: String) -> Message {
        Message(.assistant, [.text(text)])
    }

    /// How the model is to behave.
    public static func system(_ text: String) -> Message {
        Message(.system, [.text(text)])
    }
}

extension Message: Encodable {
    private enum Keys: String, CodingKey {
        case role, content
    }

    public func encode(to encoder: any Encoder) throws {
        var fields = encoder.container(keyedBy: Keys.self)
        try fields.encode(role, forKey: .role)
        try fields.encode(parts, forKey: .content)
    }
}

extension Message.Part: Encodable {
    private enum Keys: String, CodingKey {
        case type, text
        case imageURL = "image_url"
    }

    private struct ImageURL: Encodable {
        let url: String
        let detail: Picture.Detail
    }

    public func encode(to encoder: any Encoder) throws {
        var fields = encoder.container(keyedBy: Keys.self)
        switch self {
        case .text(let text):
            try fields.encode("text", forKey: .type)
            try fields.encode(text, forKey: .text)
        case .picture(let picture):
            // The server knows a format by its bytes alone.
            let url = "data:image/*;base64," + picture.data.base64EncodedString()
            try fields.encode("image_url", forKey: .type)
            try fields.encode(ImageURL(url: url, detail: picture.detail), forKey: .imageURL)
        }
    }
}
